"""Checks and promotions that every function of this package applies to its arguments.

All of the control theory runs in float64 or complex128, whatever the training dtype is. A message says what was wrong,
which value was found, which values are allowed and what to do about it.
"""

from __future__ import annotations

import operator

import torch

from ..errors import ConfigurationError, DimensionError, NotFiniteError


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in complex128 when it is complex, in float64 otherwise, on its own device."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def clear_deviation(tensor: torch.Tensor) -> float:
    """The relative deviation from an exact property beyond which rounding in the tensor's own dtype is no excuse."""
    return torch.finfo(tensor.dtype).eps ** 0.5 if tensor.is_floating_point() or tensor.is_complex() else 0.0


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `NotFiniteError` naming the first entry that is NaN or infinite."""
    # A sum is finite only where all entries are; it takes a tenth of the time, and overflow is looked at again.
    if torch.isfinite(tensor.sum()):
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise NotFiniteError(
            f"{name} has {int(bad.sum())} of {tensor.numel()} entries that are not finite, the first at index {index} "
            f"({tensor[index].item()}). Only finite numbers are allowed: look for a diverged training step or an "
            f"overflow in the pass that produced {name}."
        )


def validated_rank(r: int, full_size: int) -> int:
    """Return `r` as an int; raises `DimensionError` unless `1 <= r <= full_size`."""
    try:
        rank = operator.index(r)
    except TypeError:
        raise DimensionError(f"r must be an integer, got {r!r} of type {type(r).__name__}.") from None
    if not 1 <= rank <= full_size:
        raise DimensionError(f"r is {rank}; allowed are 1 to {full_size}, the number of states of the full system.")
    return rank


def validated_gramian(name: str, gramian: torch.Tensor) -> torch.Tensor:
    """A Gramian promoted to double precision and made exactly Hermitian, after its checks.

    Raises `DimensionError` unless the shape is (..., N, N), `NotFiniteError` on NaN or infinity, and
    `ConfigurationError` when the matrix is further from Hermitian than rounding in its own dtype explains.
    Whether it is positive semidefinite is for the factorisation to find out.
    """
    if gramian.ndim < 2 or gramian.shape[-1] != gramian.shape[-2] or gramian.shape[-1] == 0:
        raise DimensionError(f"{name} has shape {tuple(gramian.shape)}; a Gramian has shape (..., N, N) with N >= 1.")
    require_finite(name, gramian)
    tolerance = clear_deviation(gramian)
    matrix = to_double(gramian)
    # Halved before adding: the sum of two entries near the largest double would overflow.
    hermitian = matrix / 2 + matrix.mH / 2
    asymmetry, size = (matrix - hermitian).abs().amax().item(), matrix.abs().amax().item()
    if asymmetry > tolerance * size:
        raise ConfigurationError(
            f"{name} is not Hermitian: it differs from its Hermitian part by {asymmetry:.3g}, with a largest entry of "
            f"{size:.3g}; allowed is {tolerance:.1g} of that. Pass the Gramian itself, not a factor of it."
        )
    return hermitian


def require_same_shape(P: torch.Tensor, Q: torch.Tensor) -> None:
    """Raise `DimensionError` unless both Gramians have the same shape and lie on the same device."""
    if P.shape != Q.shape:
        raise DimensionError(f"P has shape {tuple(P.shape)} and Q {tuple(Q.shape)}; both must be the same (..., N, N).")
    if P.device != Q.device:
        raise DimensionError(f"P is on {P.device} and Q on {Q.device}; move them to one device.")
