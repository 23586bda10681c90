"""Which layers may be cut and with which reductor: by the settings, and by what the model's configs can hold."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...architectures import (
    MixableLayer,
    NarrowableLayer,
    StateSpaceLayer,
    refused_size,
    runs_on_kernels,
    size_multiple,
)
from ...config import CompreSSMConfig
from ...errors import CalibrationError, ConfigurationError, UnsupportedModelError
from ...systems import registered_reductors
from ..measure.layer_gramians import LayerGramians

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Chosen:
    """
    The layers that may be cut.

    Args:
        layers (`list[StateSpaceLayer]`): Those that the settings choose.
        reductors (`dict[str, str]`): The reductor of each, by the layer's name.
        with_own_size (`frozenset[str]`): Those whose checkpoint can hold another state size in each layer.
    """

    layers: list[StateSpaceLayer]
    reductors: dict[str, str]
    with_own_size: frozenset[str]

    @classmethod
    def of(
        cls,
        layers: Sequence[StateSpaceLayer],
        config: CompreSSMConfig,
        holds_forms: Callable[[StateSpaceLayer], bool],
    ) -> Chosen:
        """
        Choose among the layers of a model.

        Args:
            layers (`Sequence[StateSpaceLayer]`): All layers of one model.
            config ([`CompreSSMConfig`]): Names layers and the reductor, and says what the result has to fit.
            holds_forms (`Callable`): Whether the model's class can become one that holds forms of a layer which the
                stock class cannot.

        Raises:
            [`~errors.ConfigurationError`]: the settings choose no layer.
            [`~errors.UnsupportedModelError`]: a layer cannot hold what the configuration asks for.
        """
        chosen = chosen_layers(layers, config)
        stock = {layer.name: config.stock or not holds_forms(layer) for layer in chosen}
        reductors = {layer.name: reductor_of(layer, config.reductor, stock[layer.name]) for layer in chosen}
        if config.projection_rows is not None:
            for layer in chosen:
                _require_narrowable(layer, stock[layer.name])
        own = {
            layer.name
            for layer in chosen
            if layer.sizes_may_differ(stock[layer.name], reductors[layer.name])
            and (config.projection_rows is None or layer.projections_may_differ)
        }
        for name, other in _bound_to_others(layers, reductors, own).items():
            bound = next(layer for layer in chosen if layer.name == name)
            is_free = bound.sizes_may_differ(False, bound.default_reductor(False))
            otherwise = ", or allow another form (stock=False, reductor='auto')" if is_free else ""
            raise UnsupportedModelError(
                f"{name} may be cut and {other} may not, but their model class holds one state size for both. Choose "
                f"both or none with target_layers and exclude_layers{otherwise}."
            )
        fixed = [layer for layer in chosen if layer.name not in own]
        if not config.uniform and len(chosen) > 1 and fixed:
            raise UnsupportedModelError(
                f"uniform=False would give each layer its own state size, which the checkpoint of {fixed[0].name} "
                f"({fixed[0].family}) cannot hold. Leave uniform=True."
            )
        return cls(chosen, reductors, frozenset(own))

    def limits(self, config: CompreSSMConfig) -> CompreSSMConfig:
        """
        The settings with a `multiple_of` that the caches of the layers take, and the kernels that they run on here.

        For kernels a target stays as it is.

        Args:
            config ([`CompreSSMConfig`]): The settings.

        Raises:
            [`~errors.ConfigurationError`]: a cache does not take the target.
        """
        config = self._with_sizes_of_caches(config)
        multiples = [size_multiple(layer) for layer in self._with_smaller_convolution() if runs_on_kernels(layer)]
        multiple = math.lcm(config.multiple_of, *multiples)
        if multiple == config.multiple_of or config.strategy == "target":
            return config
        logger.info(
            "state sizes are rounded up to multiples of %d, for causal-conv1d's kernels take no others.", multiple
        )
        return replace(config, multiple_of=multiple)

    def _with_sizes_of_caches(self, config: CompreSSMConfig) -> CompreSSMConfig:
        multiple = math.lcm(config.multiple_of, *(layer.cache_multiple for layer in self.layers))
        if multiple == config.multiple_of:
            return config
        family = next(layer.family for layer in self.layers if layer.cache_multiple > 1)
        target = config.target_state_size
        if target is not None and target % multiple:
            raise ConfigurationError(
                f"the state size to get is {target}, but the cache of this model ({family}) takes multiples of "
                f"{multiple} only. Give one of these."
            )
        logger.info(
            "state sizes are rounded up to multiples of %d, for the cache of %s takes no others.", multiple, family
        )
        return replace(config, multiple_of=multiple)

    def warn_of_refused_sizes(self, sizes: Mapping[str, int]) -> None:
        """
        Warn where causal-conv1d's kernels would refuse a layer that they take now.

        Args:
            sizes (`Mapping[str, int]`): The new size of each layer that is to be cut.
        """
        found = (refused_size(x, sizes[x.name]) for x in self._with_smaller_convolution() if x.name in sizes)
        line = next((line for line in found if line is not None), None)
        if line is not None:
            logger.warning("%s.", line)

    def _with_smaller_convolution(self) -> list[StateSpaceLayer]:
        """The layers whose projected entries a cut takes away, and does not only combine."""
        reductors = registered_reductors()
        return [layer for layer in self.layers if reductors[self.reductors[layer.name]].only_selects]

    def batches_per_check(self, config: CompreSSMConfig) -> int:
        """How many batches a check makes use of: those for the Gramians, and those that [`split`] sets apart."""
        count = config.calibration_batches
        return 2 * count if config.judged_on_other_batches else count + self._measures_outputs(config)

    def split(self, batches: Sequence[Any], config: CompreSSMConfig) -> tuple[list[Any], list[Any]]:
        """
        Batches to measure the Gramians on, and others to measure the effect of a cut on.

        Half of them are set apart where sizes or truncations follow the loss on them; one, where there are several,
        where the output of a time-invariant layer is compared.

        Args:
            batches (`Sequence`): All batches of a check.
            config ([`CompreSSMConfig`]): Says what is measured.

        Raises:
            [`~errors.CalibrationError`]: a single batch cannot be split.
        """
        batches = list(batches)
        if config.judged_on_other_batches:
            return split_in_half(
                batches, "strategy='loss'" if config.strategy == "loss" else "compare_truncations=True"
            )
        apart = int(self._measures_outputs(config) and len(batches) > 1)
        return batches[: len(batches) - apart], batches[len(batches) - apart :]

    def _measures_outputs(self, config: CompreSSMConfig) -> bool:
        weighted = config.gramians in ("loss_gradient", "input_weighted")
        return weighted and any(not layer.is_selective for layer in self.layers)


def split_in_half(batches: Sequence[Any], purpose: str) -> tuple[list[Any], list[Any]]:
    """
    Batches to make cuts with, and others to measure them on.

    Args:
        batches (`Sequence`): All batches.
        purpose (`str`): What asks for it, for the message.

    Raises:
        [`~errors.CalibrationError`]: there are fewer than two.
    """
    if len(batches) < 2:
        raise CalibrationError(
            f"{purpose} measures cuts on batches that they were not made with, but there is {len(batches) or 'no'} "
            "batch. Give two batches or more, smaller ones if need be."
        )
    apart = len(batches) // 2
    return list(batches[: len(batches) - apart]), list(batches[len(batches) - apart :])


def reductor_of(layer: StateSpaceLayer, name: str, stock: bool) -> str:
    """
    The reductor of a layer.

    Args:
        layer (`StateSpaceLayer`): The layer.
        name (`str`): The setting `reductor`.
        stock (`bool`): Whether the result must fit the stock class.

    Raises:
        [`~errors.UnsupportedModelError`]: the layer cannot hold what that reductor gives.
    """
    name = layer.default_reductor(stock) if name == "auto" else name
    # What no reductor would change is said first.
    layer.require_form(stock, name)
    if name not in layer.reductors(stock):
        raise UnsupportedModelError(
            f"{layer.name} ({layer.family}) cannot hold what the reductor {name!r} gives"
            f"{' in a stock model class' if name in layer.reductors(False) else ''}; "
            f"choose one of {', '.join(sorted(layer.reductors(stock)))}."
        )
    return name


def _require_narrowable(layer: StateSpaceLayer, stock: bool) -> None:
    """Raise where the projections of a layer cannot give up rows."""
    begin = f"projection_rows is set, but the projections of {layer.name} ({layer.family}) cannot give up rows: "
    if not isinstance(layer, NarrowableLayer):
        why = (
            "other sizes, or a norm, hang on their width"
            if isinstance(layer, MixableLayer)
            else "a cut makes them as small as the state already"
        )
        raise UnsupportedModelError(f"{begin}{why}. Leave projection_rows out.")
    if stock:
        raise UnsupportedModelError(
            f"{begin}the model around it is of a class of its own, which holds no layer that mixes states. Leave "
            "projection_rows out."
        )
    layer.require_own_projections()


def free_to_change(
    layers: Sequence[StateSpaceLayer], measured: Mapping[str, LayerGramians], with_own_size: Collection[str]
) -> dict[str, LayerGramians]:
    """
    The measured layers that need not keep the size of one that was not measured.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of a model.
        measured (`Mapping[str, LayerGramians]`): The Gramians of those that the calibration reached, by name.
        with_own_size (`Collection[str]`): Those whose checkpoint can hold another state size in each layer.

    Raises:
        [`~errors.CalibrationError`]: none is left.
    """
    bound = _bound_to_others(layers, measured, with_own_size)
    free = {name: found for name, found in measured.items() if name not in bound}
    if not free:
        name, other = next(iter(bound.items()))
        raise CalibrationError(f"{other} was not reached, and {name} must have its state size in their model class.")
    return free


def _bound_to_others(
    layers: Sequence[StateSpaceLayer], cut: Collection[str], with_own_size: Collection[str]
) -> dict[str, str]:
    """The name of a layer that keeps its state, by the name of one that may be cut and must have the same size."""
    keepers = {id(config): layer.name for layer in layers if layer.name not in cut for config in layer.configs[:1]}
    return {
        layer.name: keepers[id(layer.configs[0])]
        for layer in layers
        if layer.name in cut and layer.name not in with_own_size and layer.configs and id(layer.configs[0]) in keepers
    }
