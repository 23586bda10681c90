"""Figures of a check into the Trainer's own trackers (TensorBoard, trackio, W&B, ...), whichever `report_to` names."""

from __future__ import annotations

import gc
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler


def neighbours(callback: TrainerCallback) -> list[TrainerCallback]:
    """
    The other callbacks of the Trainer that a callback belongs to.

    A callback is not told its Trainer and cannot send logs of its own, so the handler that holds the callback is looked
    up among the live objects. It takes tens of milliseconds; call it once per training.

    Args:
        callback (`transformers.TrainerCallback`): A callback of the Trainer.
    """
    # The type is asked instead of the object: isinstance would wake dead weak proxies.
    handlers = [thing for thing in gc.get_objects() if issubclass(type(thing), CallbackHandler)]
    holders = [handler for handler in handlers if any(held is callback for held in handler.callbacks)]
    return [other for handler in holders for other in handler.callbacks if other is not callback]


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
