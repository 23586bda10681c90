r"""Orthonormal truncation: keep the subspace of the state, with the same basis on both sides, that loses least energy.

Error bound: none known. A transition \\( I - \beta k k^\top \\) (the delta rule) keeps its form under \\( T = W = U \\)
alone, as \\( I - \beta (U^\top k)(U^\top k)^\top \\), and stays stable, since \\( U^\top k \\) is no longer than k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._decompositions import cholesky_ex, eigh
from .._validation import require_same_shape, validated_rank
from ..hankel import HankelDecomposition, hankel_decomposition
from ..truncation import Truncation
from .balanced_each import balancing_truncation_of_each
from .reductor import KnownGramians, Reductor, StateChoice, register_reductor

_MOST_STEPS = 300

# After so many steps from every start, only the best one of each pair goes on.
_SCOUTING_STEPS = 8

# The iteration ends when this many steps in a row have gained less than this share of what is lost; what is lost counts
# as this share of all energy at least.
_PATIENCE, _GAIN, _NEGLIGIBLE = 5, 1e-4, 1e-5

# What is added to the Gramians of the dropped directions, in units of their mean eigenvalue: directions that hold next
# to nothing would otherwise be turned by any angle.
_RIDGE, _KEPT_RIDGE = 0.3, 1e-6

_HALVINGS, _SUFFICIENT = 25, 1e-4


@torch.no_grad()
def orthonormal_truncation(
    P: torch.Tensor, Q: torch.Tensor, r: int, decomposition: HankelDecomposition | None = None
) -> Truncation:
    r"""The orthonormal `U` (N x r) with the least lost energy `trace(Q E P E)`, `E = I - U U^T`; `T = W = U`.

    It is the energy that [`interpolation_residual`] measures, and no less than the \\( \sum_{i>r} \sigma_i^2 \\) of
    balanced coordinates, which are oblique. From the spans of the balanced `W` and `T` and of the largest eigenvectors
    of P + Q on, conjugate gradients descend on the subspaces of the state (Polak-Ribiere; QR as the way back to an
    orthonormal basis). No step is taken that does not gain. After some steps the best of the three goes on to the end:
    there are local minima. Source: Edelman, Arias and Smith, 1998, "The geometry of algorithms with orthogonality
    constraints".

    With \\( V \\) the dropped directions and a step \\( U + V X \\), two terms of the second derivative,
    \\( Q_{VV} X P_{UU} + P_{VV} X Q_{UU} \\), hold most of it; they are inverted by diagonalising both pairs at once.
    Their inverse is the preconditioner: eigenvalues of Gramians lie many powers of ten apart.

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): State covariance, real. Each pair of a batch has its own subspace.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian, in the same form.
        r (`int`): Number of directions to keep, from 1 to N.
        decomposition ([`HankelDecomposition`], *optional*): That of the two Gramians, where it is known already.

    Returns:
        [`Truncation`]: float64; the columns are ordered by the variance of what they keep, which is uncorrelated.

    Raises:
        DimensionError: The shapes are not `(..., N, N)`, or differ, or `r` is not an integer from 1 to N.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A matrix is not Hermitian, or clearly indefinite.
        TruncationError: No pair has a usable Hankel singular value.

    Example:

    ```python
    >>> import torch
    >>> P, Q = torch.diag(torch.tensor([4.0, 1.0, 0.1])), torch.diag(torch.tensor([1.0, 1.0, 9.0]))
    >>> orthonormal_truncation(P, Q, r=2).T.abs().round(decimals=3)
    tensor([[1., 0.],
            [0., 1.],
            [0., 0.]], dtype=torch.float64)

    ```
    """
    require_same_shape(P, Q)
    known = hankel_decomposition(P, Q) if decomposition is None else decomposition
    size, shape = known.sigma.shape[-1], known.sigma.shape[:-1]
    r = validated_rank(r, size)
    if r == size:
        every_state = torch.arange(size, device=known.L_P.device).expand(*shape, size)
        return Truncation.from_indices(every_state, full_size=size)
    factors = (_of_unit_trace(L).reshape(-1, size, size) for L in (known.L_P, known.L_Q))
    pairs = _Pairs(*factors)
    balanced = balancing_truncation_of_each(known, r)
    U = pairs.in_order(_best(pairs, [pairs.spanned(M.reshape(-1, size, r)) for M in (balanced.W, balanced.T)]))
    U = U.reshape(*shape, size, r)
    return Truncation(T=U, W=U.clone())


def _best(pairs: _Pairs, starts: list[torch.Tensor]) -> torch.Tensor:
    """Of each pair, the end of a descent from the best of some bases and one more, after some steps of each."""
    starts = [
        *starts,
        eigh(pairs.L_P @ pairs.L_P.mT + pairs.L_Q @ pairs.L_Q.mT).eigenvectors[..., -starts[0].shape[-1] :],
    ]
    count = len(starts)
    several = _Pairs(pairs.L_P.repeat(count, 1, 1), pairs.L_Q.repeat(count, 1, 1))
    ends = _descend(several, torch.cat(starts), _SCOUTING_STEPS).unflatten(0, (count, -1))
    losses = torch.stack([pairs.lost(U).flatten() for U in ends])
    best = ends[losses.argmin(0), torch.arange(losses.shape[1], device=losses.device)]
    return _descend(pairs, best)


def _of_unit_trace(factor: torch.Tensor) -> torch.Tensor:
    length = torch.linalg.matrix_norm(factor, keepdim=True)
    return factor / torch.where(length > 0, length, 1)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1) sums of products."""
    return (one * other).sum((-2, -1), keepdim=True)


def _off(U: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """What of the columns of X lies outside of the span of U."""
    return X - U @ (U.mT @ X)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of Gramians of unit trace by their factors, (B, N, N), and what is lost outside of a subspace."""

    L_P: torch.Tensor
    L_Q: torch.Tensor

    def lost(self, U: torch.Tensor) -> torch.Tensor:
        """`trace(Q E P E)` as a sum of squares, (B, 1, 1)."""
        return (self.L_Q.mT @ _off(U, self.L_P)).square().sum((-2, -1), keepdim=True)

    def gradient(self, U: torch.Tensor) -> torch.Tensor:
        """The gradient of what is lost with respect to U, outside of its span."""
        P_U, Q_U = self.L_P @ (self.L_P.mT @ U), self.L_Q @ (self.L_Q.mT @ U)
        P_E_Q_U = self.L_P @ (self.L_P.mT @ _off(U, Q_U))
        Q_E_P_U = self.L_Q @ (self.L_Q.mT @ _off(U, P_U))
        return -2 * _off(U, P_E_Q_U + Q_E_P_U)

    def preconditioned(self, U: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The step that the two largest terms of the second derivative make of a gradient, with its sign."""
        V = torch.linalg.qr(U, mode="complete")[0][..., U.shape[-1] :]
        kept = [(L.mT @ U).mT @ (L.mT @ U) for L in (self.L_P, self.L_Q)]
        dropped = [(L.mT @ V).mT @ (L.mT @ V) for L in (self.L_Q, self.L_P)]
        across_V, ratio_V = _diagonalising(*(_with_ridge(X, _RIDGE) for X in dropped))
        across_U, ratio_U = _diagonalising(*(_with_ridge(X, _KEPT_RIDGE) for X in kept))
        X = across_V @ (V.mT @ gradient) @ across_U.mT
        X = X / (1 + ratio_V.unsqueeze(-1) * ratio_U.unsqueeze(-2))
        return V @ (across_V.mT @ X @ across_U)

    def spanned(self, W: torch.Tensor) -> torch.Tensor:
        """An orthonormal basis of r dimensions that holds the span of W: states of the largest variance fill it up."""
        left, length, _ = torch.linalg.svd(W, full_matrices=False)
        present = length > length[..., :1] * W.shape[-2] * torch.finfo(W.dtype).eps
        left = left * present.unsqueeze(-2)
        covariance = _off(left, self.L_P)
        spanned = left @ left.mT + 1e-3 * covariance @ covariance.mT
        return eigh(spanned).eigenvectors[..., -W.shape[-1] :]

    def in_order(self, U: torch.Tensor) -> torch.Tensor:
        """The basis of the same span whose states are uncorrelated, the largest variance first."""
        kept = self.L_P.mT @ U
        U = U @ eigh(kept.mT @ kept).eigenvectors.flip(-1)
        largest = U.take_along_dim(U.abs().argmax(-2, keepdim=True), dim=-2)
        return U * torch.where(largest < 0, -1.0, 1.0)


def _with_ridge(matrix: torch.Tensor, share: float) -> torch.Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # A Gramian may hold nothing at all outside of a subspace.
    ridge = share * mean + torch.finfo(matrix.dtype).tiny ** 0.5
    return matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _diagonalising(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M with `M first M^T = I` and `M second M^T` diagonal, and that diagonal; both positive definite."""
    L = cholesky_ex(first)[0]
    inverse = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device), upper=False)
    ratios, turn = eigh(inverse @ second @ inverse.mT)
    return turn.mT @ inverse, ratios.clamp_min(0)


def _descend(pairs: _Pairs, U: torch.Tensor, most_steps: int = _MOST_STEPS) -> torch.Tensor:
    """Conjugate gradients, all pairs side by side; each pair's loss only ever falls."""
    lost, idle = pairs.lost(U), 0
    floor = _NEGLIGIBLE * pairs.lost(torch.zeros_like(U))
    direction = gradient = torch.zeros_like(U)
    slope_before = torch.ones_like(lost)
    for _ in range(most_steps):
        before, gradient = gradient, pairs.gradient(U)
        steepest = pairs.preconditioned(U, gradient)
        slope = _dot(gradient, steepest)
        memory = ((slope - _dot(_off(U, before), steepest)) / slope_before).clamp_min(0)
        direction = memory * _off(U, direction) - steepest
        direction = torch.where(_dot(gradient, direction) < 0, direction, -steepest)
        slope_before = torch.where(slope > 0, slope, 1)
        reached, remaining = _search(pairs, U, lost, direction, _dot(gradient, direction))
        gained = (lost - remaining) > _GAIN * torch.maximum(lost, floor)
        idle = 0 if bool(gained.any()) else idle + 1
        U, lost = reached, remaining
        if idle == _PATIENCE:
            break
    return U


def _search(
    pairs: _Pairs, U: torch.Tensor, lost: torch.Tensor, direction: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of a step and its halves that gains enough (Armijo), no longer than a right angle; or no step."""
    step = (1 / direction.square().sum((-2, -1), keepdim=True).sqrt()).clamp_max(1)
    reached, remaining = U, lost
    waiting = torch.ones_like(lost, dtype=torch.bool)
    for _ in range(_HALVINGS):
        candidate = torch.linalg.qr(U + step * direction)[0]
        found = pairs.lost(candidate)
        enough = waiting & (found <= lost + _SUFFICIENT * step * slope)
        reached, remaining = torch.where(enough, candidate, reached), torch.where(enough, found, remaining)
        waiting = waiting & ~enough
        if not waiting.any():
            break
        step = torch.where(waiting, step / 2, step)
    return reached, remaining


def _orthonormal(gramians: KnownGramians, rank: int, choice: StateChoice) -> Truncation:
    return orthonormal_truncation(gramians.P, gramians.Q, rank, gramians.decomposition)


ORTHONORMAL = register_reductor(
    Reductor(
        "orthonormal", _orthonormal, error_bound=None, keeps_states=False, only_selects=False, reduces_systems=False
    )
)
