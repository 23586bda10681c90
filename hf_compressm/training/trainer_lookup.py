"""Find the objects of a running training that the Trainer does not hand to its callbacks."""

from __future__ import annotations

import gc
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

_Found = TypeVar("_Found")


def _alive(kind: type[_Found]) -> list[_Found]:
    """All objects of a class, or of one that inherits from it, that are not collected yet."""
    # The type is asked instead of the object: isinstance would wake dead weak proxies.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def find_trainers(callback: TrainerCallback) -> list[Trainer]:
    """
    The Trainers that hold a callback (one, as a rule); a callback is not given them.

    Args:
        callback (`transformers.TrainerCallback`): A callback of the Trainer.
    """
    handlers = [(trainer, getattr(trainer, "callback_handler", None)) for trainer in _alive(Trainer)]
    return [
        trainer
        for trainer, handler in handlers
        if handler is not None and any(held is callback for held in handler.callbacks)
    ]


def neighbours(callback: TrainerCallback) -> list[TrainerCallback]:
    """
    The other callbacks of the Trainer that a callback belongs to.

    A callback is not given its Trainer and cannot send logs of its own, so the handler that holds the callback is
    looked up among the live objects. It takes tens of milliseconds; call it once per training.

    Args:
        callback (`transformers.TrainerCallback`): A callback of the Trainer.
    """
    holders = [handler for handler in _alive(CallbackHandler) if any(held is callback for held in handler.callbacks)]
    return [other for handler in holders for other in handler.callbacks if other is not callback]


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """
    All data-parallel wrappers of a model that are alive; the Trainer shows its wrapper to no callback.

    Args:
        model (`torch.nn.Module`): The model without its wrapper.
    """
    return [wrapper for wrapper in _alive(DistributedDataParallel) if wrapper.module is model]


def wrapper_in_use(model: nn.Module) -> DistributedDataParallel | None:
    """
    The wrapper that a training runs through, of those of a model; an earlier training may have left one.

    Args:
        model (`torch.nn.Module`): The model without its wrapper.
    """
    found = wrappers_of(model)
    if len(found) > 1:
        # One that nobody holds any more waits in a cycle for its end; the order of what is alive says nothing of age.
        found = []
        gc.collect()
        found = wrappers_of(model)
    if len(found) > 1:
        wrapped = [getattr(trainer, "model_wrapped", None) for trainer in _alive(Trainer)]
        # Private API of torch.
        used = {id(getattr(module, "_orig_mod", module)) for module in wrapped}
        found = [wrapper for wrapper in found if id(wrapper) in used] or found
    return found[-1] if found else None
