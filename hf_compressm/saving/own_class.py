"""The class that a model was made with, where FSDP has put one of its own in the place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def own_class(model: nn.Module) -> type[nn.Module]:
    """
    The class that a model has without FSDP.

    `fully_shard` makes a class of torch's own, which derives from the model's, and gives it to the model.

    Args:
        model (`torch.nn.Module`): A model, sharded or not.
    """
    # Importing it takes time, and where nobody has, nothing is sharded.
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None:
        return type(model)
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, sharded))


@contextmanager
def with_own_class(model: nn.Module) -> Iterator[None]:
    """
    Let a model have its own class for a while, as while it is saved.

    A model that brings its code is saved with the file of its class, whose name is in its configuration. Of the class
    that FSDP gives it, that would be a file of torch.

    Args:
        model (`torch.nn.Module`): A model, sharded or not.
    """
    present = type(model)
    model.__class__ = own_class(model)
    try:
        yield
    finally:
        model.__class__ = present
