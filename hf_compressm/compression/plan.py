"""From spectra to state sizes. Pure: nothing is written, and equal spectra give equal plans in every process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..config import CompreSSMConfig
from ..systems import energy_rank, shared_energy_ranks, shared_ranks
from .moment import Moment


@dataclass(frozen=True)
class LayerPlan:
    """
    What one check wants of one layer.

    Args:
        size (`int`): The present state size.
        wanted (`int`): The size that the spectra (or the schedule) ask for.
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
    moment: Moment | None = None,
) -> dict[str, LayerPlan]:
    r"""
    Decide the new state size of every layer.

    A layer is cut only where the new size is at most `1 - minimum_reduction` of the present one, the 5% gate of
    Chahine et al., 2026 (arXiv 2510.02823). With `uniform`, all layers get the size that the most demanding one needs,
    the gate looks at the largest present size, and one layer that waits lets all wait.

    Args:
        spectra (`Mapping[str, torch.Tensor]`): Hankel singular values of each layer, `(N,)`, descending.
        sizes (`Mapping[str, int]`): Present state size of each layer.
        config ([`CompreSSMConfig`]): Strategy, tolerance and limits.
        moment ([`Moment`], *optional*): Where in the run the check is made; a single check of its own when unset.

    Raises:
        [`~errors.NotFiniteError`]: a spectrum holds NaN.
    """
    moment = moment or Moment()
    wanted = _wanted_sizes(spectra, sizes, config, moment)
    if config.uniform:
        largest = max(wanted.values())
        cut = not moment.waiting and _passes_gate(largest, max(sizes.values()), config, moment)
        return {
            name: LayerPlan(size, wanted[name], min(largest, size) if cut else size) for name, size in sizes.items()
        }
    cut = {
        name: name not in moment.waiting and _passes_gate(wanted[name], size, config, moment)
        for name, size in sizes.items()
    }
    return {name: LayerPlan(size, wanted[name], wanted[name] if cut[name] else size) for name, size in sizes.items()}


def _wanted_sizes(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig, moment: Moment
) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for names in _budgets(spectra, sizes, config, moment):
        found = {name: spectra[name] for name in names}
        if config.strategy == "tolerance":
            ranks |= _ranks_of_energy(found, config, moment)
        else:
            ranks |= _ranks_of_total(found, {name: sizes[name] for name in names}, config, moment)
    return {name: _bounded(ranks[name], size, config) for name, size in sizes.items()}


def _budgets(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig, moment: Moment
) -> list[list[str]]:
    """The layers that share one budget. Those that wait share none with those that are cut without them."""
    shared: dict[bool, list[str]] = {}
    if config.budget == "model":
        for name in sizes:
            # A spectrum that is zero ranks nothing, so that nothing tells what the layer could give to others.
            if bool(spectra[name].any()):
                shared.setdefault(not config.uniform and name in moment.waiting, []).append(name)
    together = {name for names in shared.values() for name in names}
    return [*shared.values(), *([name] for name in sizes if name not in together)]


def _ranks_of_energy(spectra: Mapping[str, Tensor], config: CompreSSMConfig, moment: Moment) -> dict[str, int]:
    tolerance = config.tolerance * moment.scale
    if len(spectra) > 1 and not config.uniform:
        ranks = shared_energy_ranks(list(spectra.values()), tolerance, config.min_state_size)
        return dict(zip(spectra, ranks))
    rank = int(energy_rank(_joint_spectrum(list(spectra.values())), tolerance))
    return dict.fromkeys(spectra, rank)


def _joint_spectrum(spectra: Sequence[Tensor]) -> Tensor:
    """The sums of the i-th values: what layers of one common size lose together."""
    largest = max(len(sigma) for sigma in spectra)
    padded = [F.pad(sigma.double().cpu(), (0, largest - len(sigma))) for sigma in spectra]
    return sum(padded[1:], padded[0])


def _ranks_of_total(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig, moment: Moment
) -> dict[str, int]:
    if len(sizes) > 1 and config.uniform:
        return {name: _scheduled({name: size}, config, moment) for name, size in sizes.items()}
    total = _scheduled(sizes, config, moment)
    if len(sizes) == 1:
        return dict.fromkeys(sizes, total)
    return dict(zip(spectra, shared_ranks(list(spectra.values()), total, config.min_state_size)))


def _scheduled(sizes: Mapping[str, int], config: CompreSSMConfig, moment: Moment) -> int:
    """The number of states that layers keep together where no spectrum is asked."""
    size = sum(sizes.values())
    if config.strategy != "target":
        return math.ceil(round((1 - (1 - config.keep_ratio) * moment.scale) * size, 6))
    originals = [moment.original_sizes.get(name, size) for name, size in sizes.items()]
    targets = [config.target_state_size or math.ceil(round(config.target_ratio * n, 6)) for n in originals]
    target = sum(min(target, original) for target, original in zip(targets, originals))
    return _next_rung(size, sum(originals), target, config, moment)


def _bounded(rank: int, size: int, config: CompreSSMConfig) -> int:
    rank = max(rank, config.min_state_size)
    rank = math.ceil(rank / config.multiple_of) * config.multiple_of
    return min(rank, size)


def _next_rung(size: int, original: int, target: int, config: CompreSSMConfig, moment: Moment) -> int:
    """The size on a ladder of equal ratios from the original one down to the target."""
    # Layers that are cut once, when they have settled, go to the target at once.
    share = 1.0 if config.when_stable is not None else moment.number / moment.total
    rung = min(size, math.ceil(round(original * (target / original) ** share, 6)))
    return math.ceil(round(size * (rung / size) ** moment.scale, 6))


def _passes_gate(new_size: int, size: int, config: CompreSSMConfig, moment: Moment) -> bool:
    # A target was promised for the end of the window, however small the last step to it is.
    least = 0.0 if config.strategy == "target" and moment.is_last else config.minimum_reduction
    return new_size < size and new_size <= round((1 - least) * size, 6)
