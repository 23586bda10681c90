"""Find the objects of a running training that the Trainer does not hand to its callbacks."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

_Found = TypeVar("_Found")


def _callers(kind: type[_Found]) -> list[_Found]:
    """The objects of a class whose methods, those of its own module, are being called; the nearest first."""
    found: list[_Found] = []
    frame = inspect.currentframe()
    while frame is not None:
        # To ask a frame for its variables keeps them alive until it ends (Python 3.12 and older): no user's frame is.
        if frame.f_globals.get("__name__") == kind.__module__:
            caller = frame.f_locals.get("self")
            if isinstance(caller, kind) and not any(caller is other for other in found):
                found.append(caller)
        frame = frame.f_back
    return found


def find_trainers(callback: TrainerCallback) -> list[Trainer]:
    """
    The Trainers that hold a callback (one, as a rule). An event does not say whose it is.

    Args:
        callback (`transformers.TrainerCallback`): A callback of the Trainer, in one of its events.
    """
    return _holding(Trainer, callback, lambda trainer: getattr(trainer, "callback_handler", None))


def neighbours(callback: TrainerCallback) -> list[TrainerCallback]:
    """
    The other callbacks of the Trainer that a callback belongs to; it cannot send logs of its own.

    Args:
        callback (`transformers.TrainerCallback`): A callback of the Trainer, in one of its events.
    """
    handlers = _holding(CallbackHandler, callback, lambda handler: handler)
    return [other for handler in handlers for other in handler.callbacks if other is not callback]


def _holding(
    kind: type[_Found], callback: TrainerCallback, handler_of: Callable[[_Found], CallbackHandler | None]
) -> list[_Found]:
    """The callers with a handler that holds a callback; where none calls, as in a loop of a user's own, all of them."""
    for candidates in (_callers, _alive):
        pairs = [(thing, handler_of(thing)) for thing in candidates(kind)]
        found = [
            thing
            for thing, handler in pairs
            if handler is not None and any(held is callback for held in handler.callbacks)
        ]
        if found:
            return found
    return []


def _alive(kind: type[_Found]) -> list[_Found]:
    """All objects of a class, or of one that inherits from it, that are not collected yet."""
    # The type is asked instead of the object: isinstance would wake dead weak proxies.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


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
        wrapped = [getattr(trainer, "model_wrapped", None) for trainer in _callers(Trainer)]
        # Private API of torch.
        used = {id(getattr(module, "_orig_mod", module)) for module in wrapped}
        found = [wrapper for wrapper in found if id(wrapper) in used] or found
    return found[-1] if found else None
