"""From a Hankel spectrum to a state size: the rank rule, its error bound, and how stable an order of states is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ConfigurationError, DimensionError
from ._validation import require_finite, to_double, validated_rank


def energy_rank(sigma: torch.Tensor, tolerance: float) -> int | torch.Tensor:
    """The smallest `r` with `sum_{i<=r} sigma_i >= (1 - tolerance) * sum_i sigma_i`: the rank rule of CompreSSM.

    The tolerance is the share of the Hankel energy that may be dropped, and the sum is over `sigma`, not `sigma^2`.
    Source: Chahine, Nazari, Rus and Rusch (2026), arXiv 2510.02823.

    The rule is evaluated on the sum that is dropped, added up from its smallest term, so a tolerance below the rounding
    of the whole sum still means something. A tolerance that no truncation can meet keeps all states. A spectrum that is
    zero keeps all states too: it ranks nothing, and it is what a layer shows whose readout starts from zero, to which a
    cut would do harm.

    Args:
        sigma (`torch.Tensor` of shape `(..., N)`): Hankel singular values, non-negative and descending.
        tolerance (`float`): Share of the energy that may be dropped, strictly between 0 and 1.

    Returns:
        `int` for one spectrum, `torch.Tensor` of shape `(...)` and dtype int64 for a batch: from 1 to N.

    Raises:
        ConfigurationError: The tolerance is not inside (0, 1), or `sigma` is negative or not descending.
        DimensionError: `sigma` is a scalar or empty.
        NotFiniteError: `sigma` holds NaN or infinity.

    Example:

    ```python
    >>> import torch
    >>> energy_rank(torch.tensor([90.0, 9.0, 0.9, 0.1]), tolerance=0.02)
    2

    ```
    """
    _require_tolerance(tolerance)
    sigma = _validated_spectrum(sigma)
    # Scaled by the largest, so that the sum of a spectrum near the largest double stays finite.
    relative = sigma / sigma[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    dropped = relative.flip(-1).cumsum(-1).flip(-1)  # dropped[r] = sum_{i > r} sigma_i
    total = dropped[..., :1]
    rank = (dropped > tolerance * total).sum(-1)
    rank = torch.where(total.squeeze(-1) > 0, rank, sigma.shape[-1])
    return int(rank) if rank.ndim == 0 else rank


def joint_energy_ranks(spectra: Sequence[torch.Tensor], tolerance: float, least: int = 1) -> list[int]:
    """The ranks of several systems that keep `1 - tolerance` of their joint Hankel energy with the fewest states.

    The dropped states are those with the smallest Hankel singular values of all systems together, as many as the joint
    budget `tolerance * sum_l sum_i sigma_li` allows. No choice of the same budget drops more of them: within a system
    states go from the smallest up, so exchanging a dropped one for another never makes room. A spectrum that is zero
    keeps all of its states, as in `energy_rank`.

    Args:
        spectra (`Sequence[torch.Tensor]` of shapes `(N_l,)`): Hankel singular values, non-negative and descending.
        tolerance (`float`): Share of the joint energy that may be dropped, strictly between 0 and 1.
        least (`int`, *optional*, defaults to 1): No system keeps fewer states, unless it has fewer.

    Returns:
        `list[int]`: One rank for each system, from 1 to its N.

    Raises:
        ConfigurationError: The tolerance is not inside (0, 1), or a spectrum is negative or not descending.
        DimensionError: A spectrum is a scalar or empty.
        NotFiniteError: A spectrum holds NaN or infinity.

    Example:

    ```python
    >>> import torch
    >>> joint_energy_ranks([torch.tensor([90.0, 9.0]), torch.tensor([0.7, 0.2, 0.1])], tolerance=0.02)
    [2, 1]

    ```
    """
    _require_tolerance(tolerance)
    checked = [_validated_spectrum(sigma).cpu() for sigma in spectra]
    exponent = max(math.frexp(max(float(sigma[0]) for sigma in checked))[1], -1000)
    ranks = [len(sigma) for sigma in checked]
    # Scaled near the largest, so that sums stay finite, and by a power of two, which rounds nothing.
    relative = [sigma * 2.0**-exponent if sigma[0] > 0 else sigma[:0] for sigma in checked]
    total = sum(float(sigma.flip(0).sum()) for sigma in relative)
    candidates = [
        (float(value), -state, system)
        for system, sigma in enumerate(relative)
        for state, value in enumerate(sigma.tolist())
        if state >= max(least, 1)
    ]
    dropped = 0.0
    # Of equal values in one system the last goes first, so that what stays is always a leading part.
    for value, _, system in sorted(candidates):
        dropped += value
        if dropped > tolerance * total:
            break
        ranks[system] -= 1
    return ranks


def error_bound(sigma: torch.Tensor, r: int) -> float | torch.Tensor:
    """Upper bound on the H-infinity error of a balanced truncation to `r` states: `2 * sum_{i>r} sigma_i`.

    Source: Enns (1984) and Glover (1984) in continuous time; Al-Saggaf and Franklin (1987) and Hinrichsen and Pritchard
    (1990) in discrete time.

    Args:
        sigma (`torch.Tensor` of shape `(..., N)`): Hankel singular values, non-negative and descending.
        r (`int`): Number of states kept, from 1 to N.

    Returns:
        `float` for one spectrum, `torch.Tensor` of shape `(...)` and dtype float64 for a batch: 0 at `r = N`.

    Raises:
        ConfigurationError: `sigma` is negative or not descending.
        DimensionError: `sigma` is a scalar or empty, or `r` is outside 1 to N.
        NotFiniteError: `sigma` holds NaN or infinity.

    Example:

    ```python
    >>> import torch
    >>> error_bound(torch.tensor([4.0, 2.0, 0.5, 0.25]), r=2)
    1.5

    ```
    """
    sigma = _validated_spectrum(sigma)
    bound = 2 * sigma[..., validated_rank(r, sigma.shape[-1]) :].flip(-1).sum(-1)
    return bound.item() if bound.ndim == 0 else bound


def rank_correlation(scores_a: torch.Tensor, scores_b: torch.Tensor) -> float | torch.Tensor:
    """Spearman's rank correlation of two score vectors over the same states: 1 for the same order, -1 for the reverse.

    CompreSSM rests on the order of the states' importance being stable from one check to the next; this measures it.
    Tied scores share the mean of their ranks. Two vectors that rank the states alike correlate with 1 even where all
    scores are tied; otherwise a vector that ranks nothing correlates with 0.

    Source: Spearman (1904); the correlation coefficient of the ranks.

    Args:
        scores_a (`torch.Tensor` of shape `(..., N)`): One score per state.
        scores_b (`torch.Tensor` of shape `(..., N)`): One score per state, in the same order of states.

    Returns:
        `float` for two vectors, `torch.Tensor` of shape `(...)` and dtype float64 for a batch: from -1 to 1.

    Raises:
        DimensionError: The shapes differ, or are scalar or empty.
        NotFiniteError: A score is NaN or infinite.

    Example:

    ```python
    >>> import torch
    >>> rank_correlation(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.9, 0.1, 0.2]))
    1.0

    ```
    """
    if scores_a.shape != scores_b.shape or scores_a.ndim < 1 or scores_a.shape[-1] == 0:
        raise DimensionError(
            f"the score vectors have shapes {tuple(scores_a.shape)} and {tuple(scores_b.shape)}; both must be (..., N) "
            f"with one score for each of the same N >= 1 states."
        )
    require_finite("scores_a", scores_a)
    require_finite("scores_b", scores_b)
    a, b = _centred_ranks(scores_a), _centred_ranks(scores_b)
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    correlation = torch.where(size > 0, (a * b).sum(-1) / torch.where(size > 0, size, 1), 0.0)
    # Exact agreement is 1 whatever the rounding, and the only meaningful answer where nothing is ranked.
    correlation = torch.where((a == b).all(-1), 1.0, correlation.clamp(-1, 1))
    return correlation.item() if correlation.ndim == 0 else correlation


def _require_tolerance(tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise ConfigurationError(
            f"tolerance is {tolerance}; allowed is a number strictly between 0 and 1, the share of the Hankel energy "
            f"that may be dropped (0.01 keeps 99%)."
        )


def _validated_spectrum(sigma: torch.Tensor) -> torch.Tensor:
    if sigma.ndim < 1 or sigma.shape[-1] == 0:
        raise DimensionError(f"sigma has shape {tuple(sigma.shape)}; a spectrum has shape (..., N) with N >= 1.")
    require_finite("sigma", sigma)
    sigma = to_double(sigma)
    if (sigma < 0).any() or (sigma.diff(dim=-1) > 0).any():
        raise ConfigurationError(
            f"sigma is negative or not descending: its smallest entry is {sigma.min():.3g} and its largest increase "
            f"{sigma.diff(dim=-1).clamp_min(0).amax() if sigma.shape[-1] > 1 else 0:.3g}. Pass Hankel singular values "
            f"as hankel_singular_values returns them, sorted from large to small."
        )
    return sigma


def _centred_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks minus their mean, float64; tied scores share the mean of their ranks."""
    below = (scores.unsqueeze(-1) > scores.unsqueeze(-2)).sum(-1)
    above = (scores.unsqueeze(-1) < scores.unsqueeze(-2)).sum(-1)
    return (below - above).to(torch.float64) / 2
