"""Which families there are, and which layers of a model belong to one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigurationError, UnsupportedModelError
from .changes import AttributeChange
from .contract import StateSpaceLayer
from .unsupported import reasons

_FAMILIES: dict[str, type[StateSpaceLayer]] = {}


def register(layer_class: type[StateSpaceLayer]) -> type[StateSpaceLayer]:
    """
    Make a family known; usable as a class decorator.

    Raises:
        [`~errors.ConfigurationError`]: another class has already taken the family's name.
    """
    known = _FAMILIES.get(layer_class.family)
    if known is not None and known is not layer_class:
        raise ConfigurationError(
            f"the family {layer_class.family!r} is already registered by {known.__module__}.{known.__qualname__}; "
            f"give {layer_class.__qualname__} another name."
        )
    _FAMILIES[layer_class.family] = layer_class
    return layer_class


def registered_families() -> dict[str, type[StateSpaceLayer]]:
    """The known families by name."""
    return dict(_FAMILIES)


def find_layers(model: nn.Module) -> list[StateSpaceLayer]:
    """
    All layers of a model whose state can be cut, in the order of `model.named_modules()`.

    Raises:
        [`~errors.UnsupportedModelError`]: the model is no module, there is no layer (the message lists what was found
            and what is supported), a layer's parameters are in a form that cannot be cut, or two layers share one.
    """
    if not isinstance(model, nn.Module):
        kind = "class" if isinstance(model, type) else f"{type(model).__name__}"
        raise UnsupportedModelError(
            f"the model is a {kind}; give a torch.nn.Module, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    layers = [
        layer_class(name, module, _configs_around(model, name))
        for name, module in model.named_modules()
        for layer_class in _FAMILIES.values()
        if layer_class.matches(module)
    ]
    if not layers:
        raise UnsupportedModelError(_nothing_found(model))
    owners: dict[int, str] = {}
    for layer in layers:
        layer.require_reducible()
        for name, parameter in layer.state_parameters().items():
            qualified = f"{layer.name}.{name}"
            owner = owners.setdefault(id(parameter), qualified)
            if owner != qualified:
                raise UnsupportedModelError(
                    f"{owner} and {qualified} are one shared parameter; layers that share state parameters cannot be "
                    "cut. Give each layer parameters of its own."
                )
    return layers


def config_changes(layers: Sequence[StateSpaceLayer], sizes: Mapping[str, int]) -> list[AttributeChange]:
    """
    What the configs of a model have to say when its layers get new sizes.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of the model.
        sizes (`Mapping[str, int]`): New sizes by layer name, the projected ones where a layer mixes states; layers that
            it does not name keep theirs.
    """
    changes: list[AttributeChange] = []
    for family in dict.fromkeys(type(layer) for layer in layers):
        members = [layer for layer in layers if type(layer) is family]
        changes += family.config_changes(members, [sizes.get(layer.name, layer.projected_size) for layer in members])
    return changes


def _configs_around(model: nn.Module, name: str) -> list[Any]:
    """
    The config of a module, or of the nearest module that holds it, and others of its kind further out, each once.

    A model that holds another model has that one's config inside its own; where it is a copy, it has to follow too.
    """
    path = [part for part in name.split(".") if part]
    owners = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    held = [config for owner in owners if hasattr(config := getattr(owner, "config", None), "__dict__")]
    if not held:
        return []
    # A layer of another package than its model, as of `xlstm`, has a config of another kind than that one.
    nearest = next((config for config in held if getattr(config, "model_type", None)), held[0])
    kind = getattr(nearest, "model_type", None)
    inner = [value for config in held for value in vars(config).values()]
    alike = [config for config in [*held, *inner] if kind and getattr(config, "model_type", None) == kind]
    return list({id(config): config for config in [nearest, *alike, held[0]]}.values())


def _nothing_found(model: nn.Module) -> str:
    found = Counter(type(module).__name__ for module in model.modules())
    listed = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in found.most_common(12))
    more = f" and {len(found) - 12} other kinds" if len(found) > 12 else ""
    why = "".join(f" {name}: {reason}." for name, reason in reasons(model).items())
    return (
        f"{type(model).__name__} has no layer whose state can be cut. Supported families: "
        f"{', '.join(sorted(_FAMILIES)) or 'none'}. Found: {listed}{more}.{why}"
    )
