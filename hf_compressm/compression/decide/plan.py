"""From spectra to state sizes. Pure: nothing is written, and equal spectra give equal plans in every process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...config import CompreSSMConfig
from ...systems import energy_rank, joint_energy_ranks
from .progress import Stage


@dataclass(frozen=True)
class LayerPlan:
    """
    What one check wants of one layer.

    Args:
        size (`int`): The present state size.
        wanted (`int`): The size that the layer's own spectrum (or the schedule) asks for.
        new_size (`int`): The size that the layer gets; equal to `size` where it stays as it is.
    """

    size: int
    wanted: int
    new_size: int

    @property
    def is_cut(self) -> bool:
        """Whether the layer becomes smaller."""
        return self.new_size < self.size


def plan_reduction(
    spectra: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: CompreSSMConfig,
    stage: Stage | None = None,
) -> dict[str, LayerPlan]:
    r"""
    Decide the new state size of every layer.

    A layer is cut only where the new size is at most `1 - minimum_reduction` of the present one, the 5% gate of
    Chahine et al., 2026 (arXiv 2510.02823). With `uniform`, all layers get the size that the most demanding one needs,
    the gate looks at the largest present size, and one layer that waits lets all wait. With `budget="model"` what a
    layer that is not cut would have dropped is given to no other.

    Args:
        spectra (`Mapping[str, torch.Tensor]`): Hankel singular values of each layer, `(N,)`, descending.
        sizes (`Mapping[str, int]`): Present state size of each layer.
        config ([`CompreSSMConfig`]): Strategy, tolerance and limits.
        stage ([`Stage`], *optional*): Where in the run the check is made; a single check of its own when unset.

    Raises:
        [`~errors.NotFiniteError`]: a spectrum holds NaN.
    """
    stage = stage or Stage()
    return plan_of_ranks(_ranks(spectra, sizes, config, stage), sizes, config, stage)


def plan_of_ranks(
    ranks: Mapping[str, int], sizes: Mapping[str, int], config: CompreSSMConfig, stage: Stage
) -> dict[str, LayerPlan]:
    """
    The plan that follows from what each layer asks for, as [`plan_reduction`] describes it.

    Args:
        ranks (`Mapping[str, int]`): What is asked for, before it is rounded and bounded.
        sizes (`Mapping[str, int]`): Present state size of each layer.
        config ([`CompreSSMConfig`]): Its limits are used.
        stage ([`Stage`]): Where in the run the check is made.
    """
    wanted = {name: _rounded(ranks[name], size, config) for name, size in sizes.items()}
    if config.uniform:
        largest = max(wanted.values())
        cut = not stage.waiting and _passes_gate(largest, max(sizes.values()), config, stage)
        return {
            name: LayerPlan(size, wanted[name], min(largest, size) if cut else size) for name, size in sizes.items()
        }
    cut = {
        name: name not in stage.waiting and _passes_gate(wanted[name], size, config, stage)
        for name, size in sizes.items()
    }
    return {name: LayerPlan(size, wanted[name], wanted[name] if cut[name] else size) for name, size in sizes.items()}


def _ranks(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig, stage: Stage
) -> dict[str, int]:
    """The sizes that the strategy asks for, before they are rounded and bounded."""
    if config.budget == "model":
        tolerance = config.tolerance * stage.scale
        return dict(zip(sizes, joint_energy_ranks([spectra[name] for name in sizes], tolerance, config.min_state_size)))
    return {name: _rank(spectra[name], name, size, config, stage) for name, size in sizes.items()}


def _rank(sigma: Tensor, name: str, size: int, config: CompreSSMConfig, stage: Stage) -> int:
    if config.strategy == "tolerance":
        return int(energy_rank(sigma, config.tolerance * stage.scale))
    if config.strategy == "target":
        return _next_rung(size, stage.original_sizes.get(name, size), config, stage)
    return math.ceil(round((1 - (1 - config.keep_ratio) * stage.scale) * size, 6))


def _rounded(rank: int, size: int, config: CompreSSMConfig) -> int:
    rank = max(rank, config.min_state_size)
    rank = math.ceil(rank / config.multiple_of) * config.multiple_of
    return min(rank, size)


def _next_rung(size: int, original: int, config: CompreSSMConfig, stage: Stage) -> int:
    """The size on a ladder of equal ratios from the original one down to the target."""
    target = config.target_state_size or math.ceil(round(config.target_ratio * original, 6))
    target = min(target, original)
    # Layers that are cut once, when they have settled, go to the target at once.
    share = 1.0 if config.when_stable is not None else stage.number / stage.total
    rung = min(size, math.ceil(round(original * (target / original) ** share, 6)))
    return math.ceil(round(size * (rung / size) ** stage.scale, 6))


def _passes_gate(new_size: int, size: int, config: CompreSSMConfig, stage: Stage) -> bool:
    # A target was promised for the end of the window, however small the last step to it is.
    least = 0.0 if config.strategy == "target" and stage.is_last else config.minimum_reduction
    return new_size < size and new_size <= round((1 - least) * size, 6)
