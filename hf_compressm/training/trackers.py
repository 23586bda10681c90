"""What a check says: a line into the log, figures into the Trainer's own trackers (TensorBoard, W&B, ...)."""

from __future__ import annotations

import logging
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger(__name__)


def trackers_among(callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """Those of the callbacks that send logs to a tracker."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def log_figures(
    scalars: dict[str, float],
    trackers: list[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    model: Any,
) -> None:
    """
    Add figures to the Trainer's log history and send them to its trackers.

    Args:
        scalars (`dict[str, float]`): The figures by name.
        trackers (`list[TrainerCallback]`): From [`trackers_among`].
        args, state, control, model: What the Trainer gave to the callback's event.
    """
    epoch = {} if state.epoch is None else {"epoch": state.epoch}
    state.log_history.append({**scalars, **epoch, "step": state.global_step})
    send_figures(scalars, trackers, args, state, control, model)


def send_figures(
    scalars: dict[str, float],
    trackers: list[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    model: Any,
) -> None:
    """
    Send figures to the trackers alone, as those that go on unchanged from one check to the next.

    Args:
        scalars (`dict[str, float]`): The figures by name.
        trackers (`list[TrainerCallback]`): From [`trackers_among`].
        args, state, control, model: What the Trainer gave to the callback's event.
    """
    epoch = {} if state.epoch is None else {"epoch": state.epoch}
    for tracker in trackers:
        tracker.on_log(args, state, control, logs={**scalars, **epoch}, model=model)


def log_line(line: str, args: TrainingArguments, state: TrainerState) -> None:
    """
    Log a line, and print it once, between the Trainer's progress bars where there are any.

    Args:
        line (`str`): What to say.
        args, state: What the Trainer gave to the callback's event.
    """
    logger.info(line)
    # Whoever wants no progress bars still has to know that the model became another one.
    if state.is_world_process_zero:
        tqdm.write(f"[compressm] {line}")
