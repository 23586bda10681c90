"""Least-squares reconstruction of many signals from few."""

from __future__ import annotations

import torch

from ..errors import DimensionError
from ._decompositions import eigh

# Directions of the kept signals with less than this share of the largest variance are rounding.
_RESOLUTION = 1e-10


@torch.no_grad()
def reconstruction(signals: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    r"""The `T` with the least squared error of `x ~ T z` over samples, `T = E[x z^T] E[z z^T]^{-1}`.

    Signals are scaled to unit variance first, so their units decide nothing; directions in which the kept ones do not
    differ from one another are left out of the inverse (a truncated pseudoinverse), so that `T` stays bounded.

    Args:
        signals (`torch.Tensor` of shape `(..., K, N)`): `x` at K samples. Any real dtype; promoted to float64.
        kept (`torch.Tensor` of shape `(..., K, M)`): `z` at the same samples.

    Returns:
        `torch.Tensor` of shape `(..., N, M)`, float64.

    Raises:
        DimensionError: The samples are not the same ones.

    Example:

    ```python
    >>> import torch
    >>> z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> T = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -3.0]], dtype=torch.float64)
    >>> bool((reconstruction(z @ T.T, z) - T).abs().max() < 1e-8)
    True

    ```
    """
    if signals.shape[:-1] != kept.shape[:-1]:
        raise DimensionError(
            f"signals have shape {tuple(signals.shape)} and kept ones {tuple(kept.shape)}; they must be (..., K, N) "
            "and (..., K, M)."
        )
    x, z = signals.double(), kept.double()
    deviation = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
    z = z / torch.where(deviation > 0, deviation, 1)
    values, vectors = eigh(z.mT @ z)
    seen = values > _RESOLUTION * values[..., -1:]
    inverse = torch.where(seen, 1 / torch.where(seen, values, 1), 0)
    T = (x.mT @ z) @ vectors * inverse.unsqueeze(-2) @ vectors.mT
    return T / torch.where(deviation > 0, deviation, 1)
