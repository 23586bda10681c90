"""State sizes that follow the loss: the smallest of several plans whose measured loss is within a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...config import CompreSSMConfig
from ...systems import energy_rank, joint_energy_ranks
from .plan import LayerPlan, plan_of_ranks
from .progress import Stage

Plan = dict[str, LayerPlan]

# Shares of the Hankel energy whose plans are compared where each layer has its own size.
_SMALLEST_SHARE, _LARGEST_SHARE, _SHARES = 1e-6, 0.9, 96


def plans_by_size(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], config: CompreSSMConfig, stage: Stage
) -> list[Plan]:
    """
    The plans that a search by loss looks at, from the fewest states in the whole model up; each one cuts something.

    With `uniform` there is one for each state size; else one for each share of the Hankel energy, of each layer or of
    the whole model.

    Args:
        spectra (`Mapping[str, torch.Tensor]`): Hankel singular values of each layer, `(N,)`, descending.
        sizes (`Mapping[str, int]`): Present state size of each layer.
        config ([`CompreSSMConfig`]): Its limits of sizes, `uniform` and `budget` are used.
        stage ([`Stage`]): Where in the run the check is made.

    Raises:
        [`~errors.NotFiniteError`]: a spectrum holds NaN.
    """
    if config.uniform:
        ranks = [dict.fromkeys(sizes, size) for size in range(1, max(sizes.values()))]
    else:
        shares = torch.logspace(0, 1, _SHARES, base=_LARGEST_SHARE / _SMALLEST_SHARE, dtype=torch.float64)
        ranks = [_ranks_at(float(share) * _SMALLEST_SHARE, spectra, config) for share in shares]
    plans = [plan_of_ranks(of_layers, sizes, config, stage) for of_layers in ranks]
    distinct = {tuple(layer.new_size for layer in plan.values()): plan for plan in plans}
    useful = [plan for plan in distinct.values() if any(layer.is_cut for layer in plan.values())]
    return sorted(useful, key=lambda plan: sum(layer.new_size for layer in plan.values()))


def _ranks_at(share: float, spectra: Mapping[str, Tensor], config: CompreSSMConfig) -> dict[str, int]:
    if config.budget == "model":
        return dict(zip(spectra, joint_energy_ranks(list(spectra.values()), share, config.min_state_size)))
    return {name: int(energy_rank(sigma, share)) for name, sigma in spectra.items()}


def smallest_within(plans: Sequence[Plan], limit: float, loss_of: Callable[[Plan], float]) -> Plan | None:
    """
    The plan with the fewest states whose loss is within a limit, found by bisection.

    Args:
        plans (`Sequence[dict]`): From the fewest states up. The loss is taken to fall along them; where it does not,
            the plan that is found is within the limit all the same, but need not be the smallest.
        limit (`float`): The largest loss that is accepted.
        loss_of (`Callable`): Measures the loss of a plan; NaN counts as beyond the limit.

    Returns:
        `dict` or `None`: None where no plan that was tried is within the limit.
    """
    found, low, high = None, 0, len(plans) - 1
    while low <= high:
        middle = (low + high) // 2
        if loss_of(plans[middle]) <= limit:
            found, high = plans[middle], middle - 1
        else:
            low = middle + 1
    return found
