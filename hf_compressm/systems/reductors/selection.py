"""Selection: keep some states as they are and count the others as zero.

Error bound: none. It is what a stock checkpoint can hold where nothing can be folded, and the baseline of every
comparison.
"""

from __future__ import annotations

from typing import get_args

import torch

from ...errors import ConfigurationError, DimensionError
from .._validation import require_finite, require_same_shape, validated_gramian, validated_rank
from ..truncation import Truncation
from .reductor import KnownGramians, Reductor, SelectionRule, StateChoice, register_reductor


def selection_truncation(
    scores: torch.Tensor, r: int, rule: SelectionRule = "largest", generator: torch.Generator | None = None
) -> Truncation:
    """Keep the `r` states with the largest (or smallest) scores, or random ones.

    Args:
        scores (`torch.Tensor` of shape `(..., N)`): One real score per state; with `rule="random"` only its shape
            counts.
        r (`int`): Number of states to keep, from 1 to N.
        rule (`str`, *optional*, defaults to `"largest"`): `"largest"`, `"smallest"` or `"random"`. Of tied scores the
            lowest index is kept first.
        generator (`torch.Generator`, *optional*): For `rule="random"`, on the device of `scores`; it makes all
            processes of a run choose the same states. Without it, the global generator is used.

    Returns:
        [`Truncation`]: A selection in float64, with indices in ascending order and `T = W`.

    Raises:
        ConfigurationError: The rule is unknown.
        DimensionError: `scores` is a scalar or complex, or `r` is not an integer from 1 to N.
        NotFiniteError: A score is NaN or infinite.

    Example:

    ```python
    >>> import torch
    >>> selection_truncation(torch.tensor([0.1, 3.0, 2.0]), r=2).indices
    tensor([1, 2])

    ```
    """
    if rule not in get_args(SelectionRule):
        raise ConfigurationError(f"rule is {rule!r}; allowed are {list(get_args(SelectionRule))}.")
    if scores.ndim < 1 or scores.is_complex():
        raise DimensionError(
            f"scores have dtype {scores.dtype} and shape {tuple(scores.shape)}; they must be real, of shape (..., N)."
        )
    r = validated_rank(r, scores.shape[-1])
    require_finite("scores", scores)
    if rule == "random":
        scores = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device=scores.device)
    order = scores.argsort(dim=-1, descending=rule != "smallest", stable=True)
    return Truncation.from_indices(order[..., :r].sort(dim=-1).values, full_size=scores.shape[-1])


@torch.no_grad()
def greedy_selection_truncation(P: torch.Tensor, Q: torch.Tensor, r: int) -> Truncation:
    """Drop one state after the other, each time the one whose loss costs least, until `r` are left.

    Of a selection that drops the states `D`, the lost observable energy is `trace(Q E)` with `E = P[D, D]`, that is the
    sum of the entries of `P * Q` (entry by entry) over `D x D`. Its diagonal alone, which scores of single states are
    made of, does not see that the losses of two states can cancel or add up. Sums over `D x D` are never negative, as
    `P * Q` is positive semidefinite (Schur, 1911). The units of a state decide nothing.

    For a layer whose kept states move as before, take the readout Gramian, the mean of `C C^T`, for `Q`: as far as `h`
    and `C` are independent, the sum over `D x D` then is the mean square of what the output loses, `sum_{n in D} C_n
    h_n`. The diagonal of `P * Q`, which leaves out what happens between two states, then scores as GHOST does (sum of
    `h_n^2 C_n^2`).

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): State covariance (controllability Gramian).
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian, or the readout Gramian.
        r (`int`): Number of states to keep, from 1 to N.

    Returns:
        [`Truncation`]: A selection in float64, with indices in ascending order and `T = W`.

    Raises:
        DimensionError: The shapes are not `(..., N, N)`, or differ, or `r` is not an integer from 1 to N.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A matrix is not Hermitian.

    Example:

    ```python
    >>> import torch
    >>> P = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])  # states 0 and 1 cancel
    >>> greedy_selection_truncation(P, Q=torch.ones(3, 3), r=1).indices
    tensor([2])

    ```
    """
    require_same_shape(P, Q)
    P, Q = validated_gramian("P", P), validated_gramian("Q", Q)
    r = validated_rank(r, P.shape[-1])
    coupling = (P * Q.conj()).real
    added = coupling.diagonal(dim1=-2, dim2=-1).clone()
    kept = torch.ones_like(added, dtype=torch.bool)
    for _ in range(P.shape[-1] - r):
        cheapest = torch.where(kept, added, torch.inf).argmin(-1, keepdim=True)
        kept.scatter_(-1, cheapest, False)
        added += 2 * coupling.take_along_dim(cheapest.unsqueeze(-1), dim=-2).squeeze(-2)
    indices = kept.nonzero()[:, -1].reshape(*kept.shape[:-1], r)
    return Truncation.from_indices(indices, full_size=P.shape[-1])


def diagonal_hankel_scores(P: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """`sqrt(P_ii Q_ii)`: the Hankel singular value that each state would have if it were alone.

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): Controllability Gramian or state covariance.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian.

    Returns:
        `torch.Tensor` of shape `(..., N)`, float64: scores for [`selection_truncation`].

    Raises:
        DimensionError: The shapes are not `(..., N, N)`, or differ.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A matrix is not Hermitian.
    """
    require_same_shape(P, Q)
    P, Q = validated_gramian("P", P), validated_gramian("Q", Q)
    variances = (M.diagonal(dim1=-2, dim2=-1).real.clamp_min(0) for M in (P, Q))
    # The root before the product: the product of two small variances would underflow.
    return torch.stack([variance.sqrt() for variance in variances]).prod(dim=0)


def _selection(gramians: KnownGramians, rank: int, choice: StateChoice) -> Truncation:
    if choice.score == "greedy" and choice.rule == "largest" and gramians.R is not None:
        return greedy_selection_truncation(gramians.P, gramians.R, rank)
    scores = gramians.readout_energy if choice.score == "readout_energy" else None
    scores = gramians.state_scores() if scores is None else scores
    generator = torch.Generator(device=scores.device).manual_seed(choice.seed)
    return selection_truncation(scores, rank, choice.rule, generator)


SELECTION = register_reductor(
    Reductor("selection", _selection, error_bound=None, keeps_states=True, only_selects=True, reduces_systems=True)
)
