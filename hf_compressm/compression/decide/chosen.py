"""Which layers may be cut: by the patterns of the settings, and by what the configs of the others can hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from ...architectures import StateSpaceLayer
from ...config import CompreSSMConfig
from ...errors import ConfigurationError


def chosen_layers(layers: Sequence[StateSpaceLayer], config: CompreSSMConfig) -> list[StateSpaceLayer]:
    """
    The layers that `target_layers` names and `exclude_layers` does not.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of a model.
        config ([`CompreSSMConfig`]): Its `target_layers` and `exclude_layers` are used.

    Raises:
        [`~errors.ConfigurationError`]: no layer is left, or one of the two names none.
    """
    names = ", ".join(layer.name for layer in layers)
    for setting in ("target_layers", "exclude_layers"):
        pattern = getattr(config, setting)
        if pattern is not None and not any(_matches(pattern, layer.name) for layer in layers):
            raise ConfigurationError(f"{setting} is {pattern!r} and names no layer; the model has {names}.")
    target, exclude = config.target_layers, config.exclude_layers
    chosen = [
        layer
        for layer in layers
        if (target is None or _matches(target, layer.name)) and (exclude is None or not _matches(exclude, layer.name))
    ]
    if not chosen:
        raise ConfigurationError(
            f"target_layers {target!r} and exclude_layers {exclude!r} leave no layer to cut; the model has {names}."
        )
    return chosen


def _matches(pattern: str | Sequence[str], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def bound_to_others(
    layers: Sequence[StateSpaceLayer], cut: Collection[str], may_differ: Callable[[StateSpaceLayer], bool]
) -> dict[str, str]:
    """
    The layers that have to keep their state because one with the same config keeps its own.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of a model.
        cut (`Collection[str]`): Names of those that may be cut; the others keep their state.
        may_differ (`Callable`): Whether the checkpoint of a layer can hold another state size in each layer.

    Returns:
        `dict[str, str]`: The name of one such other layer, by the name of the layer that is bound to it.
    """
    keepers = {id(config): layer.name for layer in layers if layer.name not in cut for config in layer.configs[:1]}
    return {
        layer.name: keepers[id(layer.configs[0])]
        for layer in layers
        if layer.name in cut and layer.configs and id(layer.configs[0]) in keepers and not may_differ(layer)
    }
