"""Which recurrent layers of a model no family supports, so that a user learns what a cut leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from .contract import StateSpaceLayer

# What layers with a state call the tensor that makes it decay, or the module by which an mLSTM makes its gate; and
# why no family cuts them, or None where nothing stands in the way but that there is no family yet.
_ONE_NUMBER = "its state is one number a channel, so it has no state size to cut"
_BY_TENSOR = {"A_log": None, "recurrent_param": _ONE_NUMBER, "time_decay": _ONE_NUMBER, "slope_rate": None}
_BY_CHILD = {"igate_preact": None}
# Those that are known by the end of their class's name.
_BY_CLASS = {
    "Mamba3": "its B and C turn in pairs by angles that follow the data, behind a norm over all states, so that states "
    "can neither be left out one by one nor mixed, and no family cuts pairs yet",
    "DeltaAttention": "of Kimi delta attention, only the layers that come with transformers are cut",
    "ShortConv": "it keeps the last inputs of a convolution and has no state to cut",
}


def unsupported_recurrent_layers(model: nn.Module, layers: Iterable[StateSpaceLayer]) -> dict[str, str]:
    """
    The recurrent layers of a model that are not among its supported ones: their classes, by their names.

    They are recognised by the names of their tensors, so that one with names of its own may be missing.

    Args:
        model (`torch.nn.Module`): The model.
        layers (`Iterable[StateSpaceLayer]`): Its supported layers, from [`~architectures.find_layers`].
    """
    known, found = [f"{layer.name}." for layer in layers], {}
    for name, module in model.named_modules():
        # A part of a layer, such as the gate that makes its decay, is no other layer.
        if _is_recurrent(module) and not f"{name}.".startswith(tuple(known)):
            found[name] = type(module).__name__
            known.append(f"{name}.")
    return found


def reasons(model: nn.Module) -> dict[str, str]:
    """
    Why layers of some classes in a model are not cut, by the name of the class; of those that have a reason.

    Args:
        model (`torch.nn.Module`): The model.
    """
    found = {type(module).__name__: _reason(module) for module in model.modules() if _is_recurrent(module)}
    return {name: reason for name, reason in found.items() if reason is not None}


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
    why = [f"{name}: {reason}" for name, reason in reasons(model).items() if name in found.values()]
    told = f" ({'; '.join(why)})" if why else ""
    return (
        f"{len(found)} recurrent layers of kinds that no family supports keep their state ({classes}): "
        f"{', '.join(found)}{told}"
    )


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) or bool(_signs(module))


def _reason(module: nn.Module) -> str | None:
    return next((reason for reason in _signs(module) if reason is not None), None)


def _signs(module: nn.Module) -> list[str | None]:
    """What each sign that a module is recurrent says of why it is not cut."""
    tensors = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    children = {name for name, _ in module.named_children()}
    return [
        *(reason for end, reason in _BY_CLASS.items() if type(module).__name__.endswith(end)),
        *(reason for name, reason in _BY_TENSOR.items() if name in tensors),
        *(reason for name, reason in _BY_CHILD.items() if name in children),
    ]
