"""Which recurrent layers of a model no family supports, so that a user learns what a cut leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from .contract import StateSpaceLayer

# What layers with a state call the tensor that makes it decay: gated delta rules and other state-space models, gated
# linear recurrences, RWKV, lightning attention; and the module by which an mLSTM makes its input gate.
_DECAY_TENSORS = ("A_log", "recurrent_param", "time_decay", "slope_rate")
_GATE_MODULES = ("igate_preact",)


def unsupported_recurrent_layers(model: nn.Module, layers: Iterable[StateSpaceLayer]) -> dict[str, str]:
    """
    The recurrent layers of a model that are not among its supported ones: their classes, by their names.

    They are recognised by the names of their tensors, so that one with names of its own may be missing.

    Args:
        model (`torch.nn.Module`): The model.
        layers (`Iterable[StateSpaceLayer]`): Its supported layers, from [`~architectures.find_layers`].
    """
    supported = tuple(f"{layer.name}." for layer in layers)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if _is_recurrent(module) and not f"{name}.".startswith(supported)
    }


def unsupported_note(model: nn.Module, layers: Iterable[StateSpaceLayer]) -> str | None:
    """
    One line that names the recurrent layers that a cut leaves alone; None where there are none.

    Args:
        model (`torch.nn.Module`): The model.
        layers (`Iterable[StateSpaceLayer]`): Its supported layers.
    """
    found = unsupported_recurrent_layers(model, layers)
    if not found:
        return None
    classes = ", ".join(f"{name} x{count}" for name, count in Counter(found.values()).items())
    return f"{len(found)} recurrent layers of kinds that no family supports keep their state ({classes}): " + ", ".join(
        found
    )


def _is_recurrent(module: nn.Module) -> bool:
    tensors = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    children = {name for name, _ in module.named_children()}
    return (
        isinstance(module, nn.RNNBase)
        or any(name in tensors for name in _DECAY_TENSORS)
        or any(name in children for name in _GATE_MODULES)
    )
