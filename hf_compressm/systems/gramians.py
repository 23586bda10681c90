"""Gramians of diagonal systems: the only code of the library that solves a Lyapunov equation.

Both Gramians have a closed form, and so have their square-root factors: see [`controllability_factor`], from which the
Hankel singular values come with full precision. [`gramian_factor`] factors a Gramian that was measured instead.
"""

from __future__ import annotations

import torch

from ..errors import ConfigurationError, DimensionError
from ._decompositions import cholesky_ex, eigh
from ._validation import clear_deviation, require_finite, validated_gramian
from .time_domain import TimeDomain, lyapunov_denominator, require_stable

# The rows of a generator start with length one, so a row this short is zero for every purpose. The limit keeps squared
# lengths away from underflow, where a normalised direction would no longer have length one.
_NEGLIGIBLE_LENGTH = 1e-140

# Elimination is the faster way where a state has at least this many companions for each input.
_FEW_INPUTS = 16


def controllability_gramian(lam: torch.Tensor, B: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """State covariance under white input: `P = A P A^H + B B^H` with `A = diag(lam)`, solved elementwise.

    `P_ij = (B B^H)_ij / (1 - lam_i conj(lam_j))`. In continuous time the equation is `A P + P A^H + B B^H = 0` and
    `P_ij = -(B B^H)_ij / (lam_i + conj(lam_j))`. Source of the equations: Antoulas, *Approximation of Large-Scale
    Dynamical Systems* (2005), chapter 4; the closed form is the equation read entry by entry.

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        B (`torch.Tensor` of shape `(..., N, H_in)`): Input matrix.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Returns:
        `torch.Tensor` of shape `(..., N, N)`, complex128: Hermitian, on `lam`'s device.

    Raises:
        DimensionError: The shapes or devices of `lam` and `B` do not fit.
        NotFiniteError: `lam` or `B` holds NaN or infinity.
        UnstableSystemError: A pole is not stable; the message names its index and value.

    Example:

    ```python
    >>> import torch
    >>> controllability_gramian(torch.tensor([0.5]), torch.tensor([[3.0]])).real  # 9 / (1 - 0.25)
    tensor([[12.]], dtype=torch.float64)

    ```
    """
    _require_inputs(lam, B, "B", time_domain)
    return _cauchy_gramian(lam.to(torch.complex128), B.to(torch.complex128), time_domain)


def observability_gramian(lam: torch.Tensor, C: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """Output energy that a unit state releases: `Q = A^H Q A + C^H C` with `A = diag(lam)`, solved elementwise.

    `Q_ij = (C^H C)_ij / (1 - conj(lam_i) lam_j)`. In continuous time the equation is `A^H Q + Q A + C^H C = 0` and
    `Q_ij = -(C^H C)_ij / (conj(lam_i) + lam_j)`. It is the controllability Gramian of the adjoint system
    `(conj(lam), C^H)`. Source, return value and errors are those of [`controllability_gramian`].

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        C (`torch.Tensor` of shape `(..., H_out, N)`): Output matrix.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.
    """
    _require_inputs(lam, C.mT, "C transposed", time_domain)
    return _cauchy_gramian(lam.to(torch.complex128).conj(), C.to(torch.complex128).mH, time_domain)


def controllability_factor(lam: torch.Tensor, B: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """A factor `L` of the controllability Gramian, `P = L L^H`, computed from `(lam, B)` without forming `P`.

    The Gramian is a Cauchy-like matrix, `P_ij = g_i g_j^H / (1 - lam_i conj(lam_j))` with the rows `g_i` of `B`, and so
    is what remains of it after a step of Cholesky elimination. With pivot `k` and `u = g_k / |g_k|`, only the component
    of each row along `u` changes, by a Blaschke factor:

        g_i <- g_i + (b(lam_i) - 1) (g_i u^H) u        b(z) = (z - lam_k) / (1 - conj(lam_k) z)

    (in continuous time, `b(z) = (z - lam_k) / (z + conj(lam_k))`). Nothing is subtracted that could cancel, so errors
    are small relative to each row of `L`, where the factor of a Gramian that was formed first has lost half of the
    digits (see `tests/systems/test_hankel.py`, against 80-digit arithmetic).

    Source: elimination on the generators of a structured matrix, Gohberg, Kailath and Olshevsky (1995); accurate
    decompositions of Cauchy matrices, Demmel (1999), used for the related con-eigenvalues by Haut and Beylkin (2012).

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        B (`torch.Tensor` of shape `(..., N, H_in)`): Input matrix.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Returns:
        `torch.Tensor` of shape `(..., N, N)`, complex128: The columns in the order of elimination, which takes the
        largest remaining diagonal entry of the Gramian first. Columns past the rank of the Gramian are zero.

    Raises:
        DimensionError, NotFiniteError, UnstableSystemError: As in [`controllability_gramian`].
    """
    _require_inputs(lam, B, "B", time_domain)
    return _cauchy_factor(lam.to(torch.complex128), B.to(torch.complex128), time_domain)


def observability_factor(lam: torch.Tensor, C: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """A factor `L` of the observability Gramian, `Q = L L^H`, computed from `(lam, C)` without forming `Q`.

    It is the controllability factor of the adjoint system `(conj(lam), C^H)`. Method, source, return value and errors
    are those of [`controllability_factor`].

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        C (`torch.Tensor` of shape `(..., H_out, N)`): Output matrix.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.
    """
    _require_inputs(lam, C.mT, "C transposed", time_domain)
    return _cauchy_factor(lam.to(torch.complex128).conj(), C.to(torch.complex128).mH, time_domain)


def cauchy_or_product_factor(
    lam: torch.Tensor, B: torch.Tensor, coarse: bool, time_domain: TimeDomain = "discrete"
) -> torch.Tensor:
    """The factor of [`controllability_factor`], or, where it may be `coarse`, a cheaper one that forms the Gramian.

    Elimination costs `N^2 H` operations of elementwise arithmetic. With many inputs, a Cholesky factorisation of the
    Gramian, scaled to a unit diagonal, takes a hundredth of the time; its backward error is `N eps` of every state's
    own variance. Where the Gramian is not numerically definite, [`gramian_factor`] takes its place.

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        B (`torch.Tensor` of shape `(..., N, H_in)`): Input matrix.
        coarse (`bool`): Whether directions of a relative variance below `N eps` may be lost.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Returns:
        `torch.Tensor` of shape `(..., N, N)`, complex128.

    Raises:
        DimensionError, NotFiniteError, UnstableSystemError: As in [`controllability_gramian`].
    """
    if not coarse or _FEW_INPUTS * B.shape[-1] < lam.shape[-1]:
        return controllability_factor(lam, B, time_domain)
    gramian = controllability_gramian(lam, B, time_domain)
    diagonal = gramian.diagonal(dim1=-2, dim2=-1).real
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt().unsqueeze(-1)
    factor, failed = cholesky_ex(gramian / scale / scale.mT)
    return gramian_factor(gramian) if failed.any() else scale * factor


def gramian_factor(gramian: torch.Tensor, name: str = "gramian") -> torch.Tensor:
    """A rank-revealing factor `L` of a positive semidefinite matrix, `gramian = L L^H`.

    It comes from a Hermitian eigendecomposition, since measured Gramians are numerically low-rank, which breaks a plain
    Cholesky factorisation. States are first scaled to a unit diagonal, which makes the error small relative to every
    state's own variance; without it the leading Hankel singular values of states that differ by many orders of
    magnitude can be wrong in the first digit. Eigenvalues of the scaled matrix below `N * eps` times the largest are
    rounding, and become zero.

    Args:
        gramian (`torch.Tensor` of shape `(..., N, N)`): Real symmetric or Hermitian, positive semidefinite; promoted to
            float64 or complex128.
        name (`str`, *optional*, defaults to `"gramian"`): What error messages call it.

    Returns:
        `torch.Tensor` of shape `(..., N, N)`, float64 or complex128: Columns in descending order of the eigenvalues of
        the scaled matrix; columns past the numerical rank are zero.

    Raises:
        DimensionError: The shape is not `(..., N, N)`.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: The matrix is not Hermitian, or clearly indefinite: setting its negative eigenvalues to zero
            would change a diagonal entry by more than `sqrt(eps)` of the largest one, eps being that of the input's
            dtype.

    Example:

    ```python
    >>> import torch
    >>> gramian_factor(torch.tensor([[4.0, 4.0], [4.0, 4.0]])).abs().round(decimals=6)
    tensor([[2., 0.],
            [2., 0.]], dtype=torch.float64)

    ```
    """
    matrix = validated_gramian(name, gramian)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).real
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    eigenvalues, eigenvectors = eigh(matrix / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)

    clipped = eigenvalues.clamp_max(0).unsqueeze(-2) * eigenvectors.abs().square()
    change = -(clipped.sum(-1) * scale.square()).amin(dim=-1)
    allowed = clear_deviation(gramian) * diagonal.amax(dim=-1).clamp_min(0)
    if (change > allowed).any():
        worst = (change - allowed).argmax()
        raise ConfigurationError(
            f"{name} is indefinite: without its negative part a diagonal entry changes by "
            f"{change.flatten()[worst]:.3g}, where the largest diagonal entry is "
            f"{diagonal.amax(dim=-1).flatten()[worst]:.3g}; rounding explains {allowed.flatten()[worst]:.3g}. "
            f"A Gramian is a sum of outer products: check how this one was accumulated."
        )
    limit = matrix.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[..., :1]
    root = torch.where(eigenvalues > limit, eigenvalues, 0).sqrt()
    # The row of a state without variance is exactly zero, which the eigenvectors know only up to rounding.
    scale = torch.where(diagonal > 0, scale, 0)
    return scale.unsqueeze(-1) * eigenvectors * root.unsqueeze(-2)


def lyapunov_residual(
    gramian: torch.Tensor, lam: torch.Tensor, factor: torch.Tensor, time_domain: TimeDomain = "discrete"
) -> torch.Tensor:
    """How well a matrix solves its Lyapunov equation: `|A P A^H - P + B B^H| / |B B^H|` in the Frobenius norm.

    For an observability Gramian pass `lam.conj()` and `C.mH` in the place of `lam` and `B`.

    Args:
        gramian (`torch.Tensor` of shape `(..., N, N)`): The candidate solution `P`.
        lam (`torch.Tensor` of shape `(..., N)`): Poles, the diagonal of `A`.
        factor (`torch.Tensor` of shape `(..., N, H)`): `B`.
        time_domain (`str`, *optional*, defaults to `"discrete"`): In continuous time the residual is that of
            `A P + P A^H + B B^H = 0`.

    Returns:
        `torch.Tensor` of shape `(...)`, float64: 0 for an exact solution; the absolute residual where `B` is zero.

    Raises:
        DimensionError, NotFiniteError, UnstableSystemError: As in [`controllability_gramian`].
    """
    _require_inputs(lam, factor, "factor", time_domain)
    if gramian.shape != (*lam.shape, lam.shape[-1]):
        raise DimensionError(
            f"gramian has shape {tuple(gramian.shape)}; with lam of shape {tuple(lam.shape)} it must be "
            f"{(*lam.shape, lam.shape[-1])}."
        )
    require_finite("gramian", gramian)
    lam, factor, gramian = (tensor.to(torch.complex128) for tensor in (lam, factor, gramian))
    constant = factor @ factor.mH
    if time_domain == "discrete":
        linear = lam.unsqueeze(-1) * gramian * lam.unsqueeze(-2).conj() - gramian
    else:
        linear = lam.unsqueeze(-1) * gramian + gramian * lam.unsqueeze(-2).conj()
    residual, size = torch.linalg.matrix_norm(linear + constant), torch.linalg.matrix_norm(constant)
    return residual / torch.where(size > 0, size, 1)


def _require_inputs(lam: torch.Tensor, factor: torch.Tensor, name: str, time_domain: TimeDomain) -> None:
    if lam.ndim < 1 or lam.shape[-1] == 0 or factor.ndim != lam.ndim + 1 or factor.shape[:-1] != lam.shape:
        raise DimensionError(
            f"lam has shape {tuple(lam.shape)} and {name} {tuple(factor.shape)}; they must be (..., N) and (..., N, H) "
            f"with the same leading dimensions and N >= 1."
        )
    if lam.device != factor.device:
        raise DimensionError(f"lam is on {lam.device} and {name} on {factor.device}; move them to one device.")
    require_finite("lam", lam)
    require_finite(name, factor)
    require_stable(lam, time_domain)


def _cauchy_gramian(x: torch.Tensor, G: torch.Tensor, time_domain: TimeDomain) -> torch.Tensor:
    gramian = (G @ G.mH) / lyapunov_denominator(x[..., :, None], x[..., None, :], time_domain)
    # A matrix product may round entries (i, j) and (j, i) differently.
    return (gramian + gramian.mH) / 2


def _cauchy_factor(x: torch.Tensor, G: torch.Tensor, time_domain: TimeDomain) -> torch.Tensor:
    denominators = lyapunov_denominator(x[..., :, None], x[..., None, :], time_domain)
    own_denominator = denominators.diagonal(dim1=-2, dim2=-1).real
    # Rows are measured in units of their largest entry, and each other in units of the longest: nothing can overflow.
    peak = G.abs().amax(dim=-1, keepdim=True)
    generator = G / torch.where(peak > 0, peak, 1)
    length = torch.linalg.vector_norm(generator, dim=-1, keepdim=True)
    generator = generator / torch.where(length > 0, length, 1)
    length = length * peak
    longest = length.amax(dim=-2, keepdim=True)
    weight = (length / torch.where(longest > 0, longest, 1)).squeeze(-1) / own_denominator.sqrt()
    factor = torch.zeros_like(denominators)
    for column in range(x.shape[-1]):
        remaining_diagonal_root = torch.linalg.vector_norm(generator, dim=-1) * weight
        pivot = remaining_diagonal_root.argmax(dim=-1, keepdim=True)
        pivot_row = generator.take_along_dim(pivot.unsqueeze(-1), dim=-2)
        pivot_length = torch.linalg.vector_norm(pivot_row, dim=-1, keepdim=True)
        present = pivot_length > _NEGLIGIBLE_LENGTH
        direction = torch.where(present, pivot_row / torch.where(present, pivot_length, 1), 0)
        component = (generator @ direction.mH).squeeze(-1)
        denominator = denominators.take_along_dim(pivot.unsqueeze(-2), dim=-1).squeeze(-1)
        factor[..., column] = component * own_denominator.take_along_dim(pivot, dim=-1).sqrt() / denominator
        # In continuous time this is minus the Blaschke factor of the docstring; its sign changes no Gramian.
        blaschke = (x - x.take_along_dim(pivot, dim=-1)) / denominator
        generator = generator + ((blaschke - 1) * component).unsqueeze(-1) * direction
        # The pivot's row is eliminated: rounding must not let it come back.
        generator.scatter_(-2, pivot.unsqueeze(-1).expand_as(pivot_row), 0)
    return length * factor
