"""From spectra to state sizes. Pure: nothing is written, and equal spectra give equal plans in every process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..config import CompreSSMConfig
from ..systems import energy_rank


@dataclass(frozen=True)
class LayerPlan:
    """
    What one check wants of one layer.

    Args:
        size (`int`): The present state size.
        wanted (`int`): The size that the layer's own spectrum asks for.
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
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig
) -> dict[str, LayerPlan]:
    r"""
    Decide the new state size of every layer.

    A layer is cut only where the new size is at most `1 - minimum_reduction` of the present one, the 5% gate of
    Chahine et al., 2026 (arXiv 2510.02823). With `uniform`, all layers get the size that the most demanding one needs,
    and the gate looks at the largest present size.

    Args:
        spectra (`Mapping[str, torch.Tensor]`): Hankel singular values of each layer, `(N,)`, descending.
        sizes (`Mapping[str, int]`): Present state size of each layer.
        config ([`CompreSSMConfig`]): Strategy, tolerance and limits.

    Raises:
        [`~errors.NotFiniteError`]: a spectrum holds NaN.
    """
    wanted = {name: _wanted_size(spectra[name], size, config) for name, size in sizes.items()}
    if config.uniform:
        largest = max(wanted.values())
        targets = {name: min(largest, size) for name, size in sizes.items()}
        cut = _passes_gate(largest, max(sizes.values()), config)
        return {name: LayerPlan(sizes[name], wanted[name], targets[name] if cut else sizes[name]) for name in sizes}
    return {
        name: LayerPlan(size, wanted[name], wanted[name] if _passes_gate(wanted[name], size, config) else size)
        for name, size in sizes.items()
    }


def _wanted_size(sigma: Tensor, size: int, config: CompreSSMConfig) -> int:
    if config.strategy == "fixed":
        rank = math.ceil(config.keep_ratio * size)
    else:
        rank = int(energy_rank(sigma, config.tolerance))
    rank = max(rank, config.min_state_size)
    rank = math.ceil(rank / config.multiple_of) * config.multiple_of
    return min(rank, size)


def _passes_gate(new_size: int, size: int, config: CompreSSMConfig) -> bool:
    return new_size < size and new_size <= (1 - config.minimum_reduction) * size
