"""Interpolative truncation: keep some states as they are and rebuild the dropped ones as combinations of them.

Error bound: none known a priori. What a truncation loses on the data behind its Gramians is measured afterwards by
[`interpolation_residual`].
"""

from __future__ import annotations

import torch

from ...errors import ConfigurationError, DimensionError
from .._decompositions import solve
from .._validation import require_same_shape, validated_rank
from ..gramians import gramian_factor
from ..truncation import Truncation
from .reductor import KnownGramians, Reductor, StateChoice, register_reductor

# A state whose variance the kept ones explain up to this share is a combination of them: the rest is rounding.
_EXPLAINED = 1e-12


@torch.no_grad()
def interpolative_truncation(
    P: torch.Tensor,
    Q: torch.Tensor,
    r: int,
    ridge: float = 1e-8,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Truncation:
    """Keep the `r` states from which the rest can be rebuilt with the least loss of observable energy.

    With the kept states `S`, the best linear estimate of the full state is `h ~ T h_S`, `T = P[:, S] P[S, S]^{-1}`, so
    `T[S] = I`: an interpolative decomposition of the state, and a Petrov-Galerkin projection whose test functions are
    coordinates. The kept states keep their dynamics, and the readout absorbs the rest, `C_r = C T`. Where the dropped
    states are exact combinations of the kept ones, nothing is lost, for any input-dependent dynamics.

    `S` is chosen greedily, by the loss of observable energy. All of it is done on states scaled to unit variance, so
    the units of a state decide nothing. A greedy choice can miss a pair of states of which only the difference matters.

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): State covariance (controllability Gramian): real symmetric or
            Hermitian, positive semidefinite. Any dtype; promoted to float64 or complex128. Each pair of a batch is cut
            for itself, all to `r` states.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian, in the same form.
        r (`int`): Number of states to keep, from 1 to N.
        ridge (`float`, *optional*, defaults to 1e-8): Regularises the inverse of `P[S, S]`, in units of each state's
            variance, so that `T` stays bounded where the kept states are nearly dependent: a smaller one loses less
            energy in exact arithmetic and more after `T` is rounded to a short float type.
        factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): [`gramian_factor`] of `P` and of `Q`, of their shape,
            where they are known; their computation is the larger part of the cost.

    Returns:
        [`Truncation`]: With `indices` in ascending order, `T` in float64 (complex128 if a Gramian is complex), on the
        device of `P`, and the `shares` `T_ns P_sn / P_nn` of the explained variance.

    Raises:
        DimensionError, NotFiniteError, ConfigurationError: The matrices are no two Gramians of one shape, `r` is not an
            integer from 1 to N, or the ridge is not positive.

    Example:

    ```python
    >>> import torch
    >>> P = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])  # state 1 is twice state 0
    >>> truncation = interpolative_truncation(P, Q=torch.eye(3), r=2)
    >>> truncation.indices, truncation.T.round(decimals=6)
    (tensor([0, 2]), tensor([[1., 0.],
            [2., 0.],
            [0., 1.]], dtype=torch.float64))

    ```
    """
    L_P, L_Q = _validated_factors(P, Q, factors)
    r = validated_rank(r, P.shape[-1])
    if not ridge > 0:
        raise ConfigurationError(f"ridge is {ridge}; allowed is a positive number, a share of each state's variance.")
    pairs = zip(L_P.reshape(-1, *L_P.shape[-2:]), L_Q.reshape(-1, *L_Q.shape[-2:]))
    indices, T, shares = (
        torch.stack(parts).reshape(*P.shape[:-2], *parts[0].shape)
        for parts in zip(*(_interpolation(*pair, r, ridge) for pair in pairs))
    )
    return Truncation.from_indices(indices, full_size=P.shape[-1], T=T, shares=shares)


def _interpolation(
    L_P: torch.Tensor, L_Q: torch.Tensor, r: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept states of one pair of Gramians, the reconstruction `T` from them, and their shares of the variance."""
    deviation = torch.linalg.vector_norm(L_P, dim=-1)
    deviation = torch.where(deviation > 0, deviation, 1)
    L_P, L_Q = L_P / deviation.unsqueeze(-1), L_Q * deviation.unsqueeze(-1)
    covariance = L_P @ L_P.mH
    kept = _greedy_selection(covariance, L_Q, r)
    regression = _regression(covariance[kept], kept, ridge)
    # Exact by definition; the ridge would shrink it.
    regression[kept] = torch.eye(r, dtype=regression.dtype, device=regression.device)
    shares = (regression.mT * covariance[kept]).real
    T = regression * (deviation.unsqueeze(-1) / deviation[kept])
    return kept, T, shares


def interpolation_residual(
    P: torch.Tensor,
    Q: torch.Tensor,
    truncation: Truncation,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> float | torch.Tensor:
    """The share of observable energy that a truncation loses: `trace(Q E) / trace(Q P)`, 0 for a perfect one.

    `E = (I - T W^H) P (I - T W^H)^H` is the covariance of `h - T h_r`, for any truncation: for the interpolative one it
    is the `R` of its greedy choice. `trace(Q P)` is `sum_i sigma_i^2`, and no truncation to `r` states loses less than
    `sum_{i>r} sigma_i^2`, which balanced coordinates reach (the theorem of Eckart and Young).

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): State covariance.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian.
        truncation ([`Truncation`]): For states of size N, with leading dimensions that broadcast.
        factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): As in [`interpolative_truncation`].

    Returns:
        `float` for one pair of Gramians, `torch.Tensor` of shape `(...)` and dtype float64 for a batch. A selection,
        which rebuilds nothing, can lose more than 1 where states cancel. 0 where there is no observable energy.

    Raises:
        DimensionError: The shapes do not fit.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A matrix is not Hermitian or clearly indefinite.
    """
    L_P, L_Q = _validated_factors(P, Q, factors)
    if truncation.full_size != P.shape[-1]:
        raise DimensionError(
            f"the truncation is for {truncation.full_size} states and the Gramians for {P.shape[-1]}; they must agree."
        )
    dtype = torch.promote_types(L_P.dtype, truncation.T.dtype)
    L_P, L_Q, T, W = (tensor.to(dtype) for tensor in (L_P, L_Q, truncation.T, truncation.W))
    # Through the factors both traces are sums of squares: nothing cancels, and no loss is negative.
    lost = torch.linalg.matrix_norm(L_Q.mH @ (L_P - T @ (W.mH @ L_P)))
    total = torch.linalg.matrix_norm(L_Q.mH @ L_P)
    share = torch.where(total > 0, lost / torch.where(total > 0, total, 1), 0.0).square()
    return share.item() if share.ndim == 0 else share


def _validated_factors(
    P: torch.Tensor, Q: torch.Tensor, known: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a pair of Gramians in one dtype, computed unless they are known already."""
    require_same_shape(P, Q)
    if P.ndim < 2 or P.shape[-1] != P.shape[-2]:
        raise DimensionError(f"P has shape {tuple(P.shape)}; it must be (..., N, N).")
    if known is not None:
        return known
    L_P, L_Q = gramian_factor(P, "P"), gramian_factor(Q, "Q")
    dtype = torch.promote_types(L_P.dtype, L_Q.dtype)
    return L_P.to(dtype), L_Q.to(dtype)


def _regression(rows: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """`P[:, S] P[S, S]^{-1}` from the rows `P[S]`, regularised where `P[S, S]` has eigenvalues below the ridge.

    Iterated once (Riley 1955): with the regression of what the first one left added, a direction of eigenvalue `e` is
    wrong by `(ridge / e)^2`, where a plain ridge is wrong by `ridge / e`.
    """
    gram = rows[:, kept]
    regularised = gram + ridge * torch.eye(len(kept), dtype=rows.dtype, device=rows.device)
    first = solve(regularised, rows)
    return (first + solve(regularised, rows - gram @ first)).mH


def _greedy_selection(covariance: torch.Tensor, L_Q: torch.Tensor, r: int) -> torch.Tensor:
    """The `r` states of unit variance with the largest gains, ascending; O(N^2) per state.

    `R`, the covariance of what the kept states leave unexplained, starts as `P`; each step takes the state `k` with the
    largest `(R Q R)_kk / R_kk`, which is the decrease of the lost observable energy `trace(Q R)`, and updates `R <- R -
    R[:, k] R[k, :] / R_kk`. Once nothing observable is left, the states with the largest `P_ii Q_ii` fill the remaining
    places. Greedy choices by Schur complements are known from pivoted Cholesky factorisations and column subset
    selection; the criterion here weighs them with the observability Gramian.
    """
    residual = covariance.clone()
    observed = L_Q.mH @ residual
    fill_order = covariance.diagonal().real * L_Q.abs().square().sum(-1)
    free = torch.ones_like(fill_order, dtype=torch.bool)
    kept = []
    for _ in range(r):
        variance = residual.diagonal().real
        candidate = free & (variance > _EXPLAINED)
        gain = torch.where(candidate, observed.abs().square().sum(0) / torch.where(candidate, variance, 1), 0)
        k = int(gain.argmax())
        if not gain[k] > 0:
            k = int(torch.where(free, fill_order, -1).argmax())
        kept.append(k)
        free[k] = False
        if candidate[k]:
            row = residual[k] / variance[k]
            observed = observed - torch.outer(observed[:, k], row)
            residual = residual - torch.outer(residual[:, k], row)
    return torch.tensor(sorted(kept), device=covariance.device)


def _interpolative(gramians: KnownGramians, rank: int, choice: StateChoice) -> Truncation:
    known = gramians.decomposition
    return interpolative_truncation(gramians.P, gramians.Q, rank, factors=(known.L_P, known.L_Q))


INTERPOLATIVE = register_reductor(
    Reductor(
        "interpolative", _interpolative, error_bound=None, keeps_states=True, only_selects=False, reduces_systems=True
    )
)
