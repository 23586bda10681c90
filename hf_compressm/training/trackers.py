"""Figures of a check into the Trainer's own trackers (TensorBoard, trackio, W&B, ...), whichever `report_to` names."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


def trackers_among(callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """Those of the callbacks that send logs to a tracker."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def report(
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
    for tracker in trackers:
        tracker.on_log(args, state, control, logs={**scalars, **epoch}, model=model)
