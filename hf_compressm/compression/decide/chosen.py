"""Which layers may be cut: by the patterns of the settings, and by what the configs of the others can hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from ...architectures import StateSpaceLayer
from ...config import CompreSSMConfig
from ...errors import CalibrationError, ConfigurationError, UnsupportedModelError
from ..measure.layer_gramians import LayerGramians


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


def require_own_sizes(
    layers: Sequence[StateSpaceLayer], chosen: Collection[str], may_differ: Callable[[StateSpaceLayer], bool]
) -> None:
    """
    Raise where a chosen layer and one that keeps its state must have one size.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of a model.
        chosen (`Collection[str]`): Names of those that may be cut.
        may_differ (`Callable`): Whether the checkpoint of a layer can hold another state size in each layer.

    Raises:
        [`~errors.UnsupportedModelError`]: there is such a layer.
    """
    for name, other in _bound_to_others(layers, chosen, may_differ).items():
        raise UnsupportedModelError(
            f"{name} may be cut and {other} may not, but their model class holds one state size for both. Choose both "
            "or none with target_layers and exclude_layers, or allow another form (stock=False, reductor='auto')."
        )


def free_to_change(
    layers: Sequence[StateSpaceLayer],
    measured: Mapping[str, LayerGramians],
    may_differ: Callable[[StateSpaceLayer], bool],
) -> dict[str, LayerGramians]:
    """
    The measured layers that need not keep the size of one that was not measured.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of a model.
        measured (`Mapping[str, LayerGramians]`): The Gramians of those that the calibration reached, by name.
        may_differ (`Callable`): Whether the checkpoint of a layer can hold another state size in each layer.

    Raises:
        [`~errors.CalibrationError`]: none is left.
    """
    bound = _bound_to_others(layers, measured, may_differ)
    free = {name: found for name, found in measured.items() if name not in bound}
    if not free:
        name, other = next(iter(bound.items()))
        raise CalibrationError(f"{other} was not reached, and {name} must have its state size in their model class.")
    return free


def _bound_to_others(
    layers: Sequence[StateSpaceLayer], cut: Collection[str], may_differ: Callable[[StateSpaceLayer], bool]
) -> dict[str, str]:
    """The name of a layer that keeps its state, by the name of one that may be cut and must have the same size."""
    keepers = {id(config): layer.name for layer in layers if layer.name not in cut for config in layer.configs[:1]}
    return {
        layer.name: keepers[id(layer.configs[0])]
        for layer in layers
        if layer.name in cut and layer.configs and id(layer.configs[0]) in keepers and not may_differ(layer)
    }
