"""Balanced truncation: keep the directions of the state with the largest Hankel singular values.

Error bound: `|G - G_r|_Hinf <= 2 sum_{i>r} sigma_i`, see [`~systems.ranks.error_bound`].
"""

from __future__ import annotations

import torch

from ...errors import TruncationError
from .._decompositions import cond, eig, solve, solve_ex
from .._validation import validated_rank
from ..hankel import HankelDecomposition
from ..lti import DiagonalLTI
from ..ranks import error_bound
from ..time_domain import stability_margin, stable_poles
from ..truncation import Truncation
from ..verification import require_error_bound

# A layer stores its reduced system in float32, whose rounding a change of basis amplifies by its condition number: 1e5
# times 6e-8 is an error of half a percent.
DEFAULT_CONDITION_LIMIT = 1e5

# Singular values below this share of the first are rarely kept; where they are, all digits are computed.
COARSE_RESOLUTION = 1e-5


@torch.no_grad()
def balanced_truncation(
    system: DiagonalLTI,
    r: int,
    condition_limit: float = DEFAULT_CONDITION_LIMIT,
    decomposition: HankelDecomposition | None = None,
) -> tuple[DiagonalLTI, Truncation]:
    """Reduce a stable system to `r` states by square-root balanced truncation, in diagonal form again.

    Source: Moore (1981); square-root method, Laub, Heath, Paige and Ward (1987); Antoulas (2005), chapter 7.

    The state matrix `A_r = W^H A T` of the balanced basis is dense. Its eigenvectors `X` make it diagonal and are
    absorbed, `T <- T X` and `W^H <- X^-1 W^H`, so the reduced system is exactly `(W^H A T = diag(lam_r), W^H B, C T,
    D)`. `D` never changes. Before it is returned, the reduced system has to be finite, stable, well enough conditioned,
    and within the error bound on the full system's own frequency response.

    Args:
        system ([`DiagonalLTI`]): A stable system, or a batch of them that are all reduced to the same `r`.
        r (`int`): Number of states to keep, from 1 to N. At N the system is returned as it is.
        condition_limit (`float`, *optional*, defaults to 1e5): Largest condition number of the eigenvectors `X`. Beyond
            it `A_r` is close to having no eigenvector basis, and a diagonal form amplifies every rounding error.
        decomposition ([`HankelDecomposition`], *optional*): The system's own, where it is known already. One of limited
            resolution is made good where `r` needs more, or where a check of its result fails.

    Returns:
        `tuple` of [`DiagonalLTI`] and [`Truncation`]: The reduced system of order `r` in the same time domain, and the
        truncation that leads to it, complex128.

    Raises:
        DimensionError: `r` is not an integer from 1 to N.
        UnstableSystemError: A pole of the system is not stable.
        TruncationError: Fewer than `r` Hankel singular values stand above rounding, or a check of the result failed.
            The message names the check and its numbers.

    Example:

    ```python
    >>> import torch
    >>> lam = torch.tensor([0.9, 0.8, -0.5])
    >>> system = DiagonalLTI(lam, B=torch.ones(3, 1), C=torch.tensor([[1.0, 1.0, 0.01]]))
    >>> reduced, truncation = balanced_truncation(system, r=2)
    >>> reduced.order, truncation.state_size, reduced.is_stable()
    (2, 2, True)
    >>> difference = system.impulse_response(100) - reduced.impulse_response(100)
    >>> bool(difference.abs().sum() < 0.05)  # of responses that sum to 15
    True

    ```
    """
    r = validated_rank(r, system.order)
    system.require_stable()
    if r == system.order:
        return system, _every_state(system)
    if decomposition is None:
        decomposition = system.hankel_decomposition(COARSE_RESOLUTION)
    try:
        return _diagonalised(system, decomposition, r, condition_limit)
    except TruncationError:
        if decomposition.resolution == 0:
            raise
        return _diagonalised(system, system.hankel_decomposition(), r, condition_limit)


def _every_state(system: DiagonalLTI) -> Truncation:
    """The truncation that drops nothing."""
    indices = torch.arange(system.order, device=system.lam.device).expand(*system.batch_shape, -1)
    return Truncation.from_indices(indices, full_size=system.order, dtype=torch.complex128)


def _diagonalised(
    system: DiagonalLTI, decomposition: HankelDecomposition, r: int, condition_limit: float
) -> tuple[DiagonalLTI, Truncation]:
    """The reduced system and its truncation in the basis of the reduced state matrix's eigenvectors, checked."""
    reduced, truncation, condition = diagonal_balanced_form(system, decomposition, r, condition_limit)
    require_error_bound(system, reduced, error_bound(decomposition.sigma, r), amplification=condition)
    return reduced, truncation


def diagonal_balanced_form(
    system: DiagonalLTI, decomposition: HankelDecomposition, r: int, condition_limit: float = DEFAULT_CONDITION_LIMIT
) -> tuple[DiagonalLTI, Truncation, float]:
    """The reduced system in balanced coordinates of any pair of Gramians, made diagonal, and checked to be stable.

    Args:
        system ([`DiagonalLTI`]): The full system, or a batch of them.
        decomposition ([`HankelDecomposition`]): Of the system's own Gramians, or of measured ones.
        r (`int`): Number of balanced coordinates to keep, from 1 to N.
        condition_limit (`float`, *optional*, defaults to 1e5): As in [`balanced_truncation`].

    Returns:
        `tuple[DiagonalLTI, Truncation, float]`: The reduced system, the truncation that leads to it, and the condition
        number of the eigenvectors that made it diagonal.

    Raises:
        DimensionError: `r` is not an integer from 1 to N.
        TruncationError: Fewer than `r` singular values stand above rounding, the reduced state matrix is nearly
            defective, or the reduced system is not stable.
    """
    balanced = balancing_truncation(decomposition, r)
    T, W = balanced.T.to(torch.complex128), balanced.W.to(torch.complex128)
    lam, X = eig(W.mH @ (system.lam.unsqueeze(-1) * T))
    condition = _validated_condition(X, condition_limit)
    truncation = Truncation(T=T @ X, W=solve(X, W.mH).mH)
    reduced = DiagonalLTI(lam, truncation.W.mH @ system.B, system.C @ truncation.T, system.D, system.time_domain)
    _require_stable_result(reduced)
    return reduced, truncation, condition


@torch.no_grad()
def balancing_truncation(decomposition: HankelDecomposition, r: int) -> Truncation:
    """The truncation to the `r` leading balanced coordinates: `T = L_P V_r S_r^{-1/2}`, `W = L_Q U_r S_r^{-1/2}`.

    In these coordinates both Gramians are `diag(sigma_1, ..., sigma_r)`. It needs no system, so it also serves a layer
    whose Gramians are measured and whose state matrix commutes with every projection.

    `W^H T = I` holds to rounding: `W` is corrected once, `W <- W (T^H W)^{-1}`, which leaves its span as it is.
    With that correction the balancing-free method (Varga 1991), which orthonormalises `T` and `W`, has nothing to add,
    and orthonormal bases depend on the scaling of the states, which makes the eigenvectors of the reduced state matrix
    ill-conditioned where states are badly scaled; balanced coordinates do not.

    Source: Laub, Heath, Paige and Ward (1987); Antoulas (2005), chapter 7.

    Args:
        decomposition ([`HankelDecomposition`]): Of a system, or of a pair of measured Gramians.
        r (`int`): Number of balanced coordinates to keep, from 1 to N.

    Returns:
        [`Truncation`]: float64 for real Gramians, complex128 otherwise; columns in the order of `sigma`.

    Raises:
        DimensionError: `r` is not an integer from 1 to N.
        TruncationError: Fewer than `r` Hankel singular values stand above rounding; the message gives the largest rank
            that is usable.
    """
    sigma = decomposition.sigma
    r = validated_rank(r, sigma.shape[-1])
    _require_usable_rank(decomposition, r)
    root = sigma[..., :r].sqrt().unsqueeze(-2)
    T = decomposition.L_P @ (decomposition.V[..., :r] / root)
    W = decomposition.L_Q @ (decomposition.U[..., :r] / root)
    # Where sigma_r is close to rounding, T^H W is far from the identity; this mends W, or Truncation refuses it.
    corrected, singular = solve_ex(W.mH @ T, W.mH)
    if singular.any():
        raise TruncationError(f"W^H T is singular at r = {r}: the decomposition does not belong to its own factors.")
    return Truncation(T=T, W=corrected.mH)


def _require_usable_rank(decomposition: HankelDecomposition, r: int) -> None:
    usable = int(decomposition.usable_rank.min())
    if r <= usable:
        return
    spectrum = decomposition.sigma.reshape(-1, decomposition.sigma.shape[-1])[
        decomposition.usable_rank.flatten().argmin()
    ]
    advice = f"reduce to at most {usable} states" if usable else "a response of zero has no balanced coordinates"
    raise TruncationError(
        f"r is {r}, but only {usable} Hankel singular values stand above rounding: sigma_{r} = {spectrum[r - 1]:.3g} "
        f"and sigma_1 = {spectrum[0]:.3g}. The largest usable rank is {usable}: {advice}, or leave this layer as it is."
    )


def _validated_condition(X: torch.Tensor, condition_limit: float) -> float:
    condition = cond(X).amax().item()
    if not condition <= condition_limit:
        raise TruncationError(
            f"the reduced state matrix is nearly defective: its eigenvectors have condition number {condition:.3g}, "
            f"allowed is {condition_limit:.3g}. Its diagonal form would amplify every rounding error by that much: "
            f"choose another rank, or leave this layer as it is."
        )
    return condition


def _require_stable_result(reduced: DiagonalLTI) -> None:
    if not stable_poles(reduced.lam, reduced.time_domain).all():
        margin = stability_margin(reduced.lam, reduced.time_domain).amin().item()
        quantity = "1 - max|lam|" if reduced.time_domain == "discrete" else "-max Re(lam)"
        raise TruncationError(
            f"the reduced system is not stable: {quantity} = {margin:.3g}, it must be positive. Hankel singular values "
            f"on both sides of the cut may be equal: choose another rank, or leave this layer as it is."
        )
