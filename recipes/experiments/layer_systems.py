"""The linear time-invariant systems inside a model, as differentiable functions of its parameters."""

from __future__ import annotations

import torch
from torch import nn

from hf_compressm.systems import DiagonalLTI


def layer_systems(model: nn.Module) -> dict[str, DiagonalLTI]:
    """
    The system of every LRU and S4D layer, by the layer's name.

    An LRU layer is one system of many inputs and outputs; an S4D layer is a batch of single-input systems, one a
    channel.

    Args:
        model (`torch.nn.Module`): A model with such layers anywhere inside.

    Raises:
        `ValueError`: there is none. Mamba's layers depend on their input and are no such systems.
    """
    systems = {}
    for name, module in model.named_modules():
        if not callable(getattr(module, "system", None)):
            continue
        lam, *B, C = module.system()
        if B:
            systems[name] = DiagonalLTI(lam, B[0], C)
        else:  # one input and one output a channel, with input weight 1
            systems[name] = DiagonalLTI(lam, torch.ones_like(lam).unsqueeze(-1), C.unsqueeze(-2))
    if not systems:
        raise ValueError(
            f"{type(model).__name__} has no layer with a time-invariant system, so its Hankel operator is not defined; "
            "use the model lru or s4d."
        )
    return systems
