"""Hankel singular values: how much each direction of a state carries from past inputs to future outputs.

They are the singular values of `L_Q^H L_P` for any factors `P = L_P L_P^H`, `Q = L_Q L_Q^H` of the Gramians, and never
computed as eigenvalues of `P Q`, which loses half of the digits and can return negative or complex numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._decompositions import eigh, svd
from ._validation import require_finite, require_same_shape
from .gramians import gramian_factor

# Products of factors lose half of the digits of double precision; a resolution below this one is not kept by them.
FINEST_RESOLUTION = 1e-6


@dataclass(frozen=True, eq=False)
class HankelDecomposition:
    """The square-root decomposition that balanced truncation works from: `L_Q^H L_P = U diag(sigma) V^H`.

    Source: Laub, Heath, Paige and Ward (1987), the square-root method for balancing.

    Args:
        L_P (`torch.Tensor` of shape `(..., N, N)`): Factor of the controllability Gramian, `P = L_P L_P^H`.
        L_Q (`torch.Tensor` of shape `(..., N, N)`): Factor of the observability Gramian, `Q = L_Q L_Q^H`.
        U (`torch.Tensor` of shape `(..., N, N)`): Left singular vectors, as columns.
        sigma (`torch.Tensor` of shape `(..., N)`): Hankel singular values, float64, descending.
        V (`torch.Tensor` of shape `(..., N, N)`): Right singular vectors, as columns.
        resolution (`float`, *optional*, defaults to 0.0): Share of `sigma_1` below which singular values are known only
            in size, and singular vectors not at all; 0 where everything is known to rounding.
    """

    L_P: torch.Tensor
    L_Q: torch.Tensor
    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor
    resolution: float = 0.0

    @classmethod
    def from_factors(cls, L_P: torch.Tensor, L_Q: torch.Tensor, resolution: float = 0.0) -> HankelDecomposition:
        """Decompose the product of two Gramian factors.

        With a `resolution`, the singular values and vectors come from the Hermitian eigenvectors of `M^H M` for the
        product `M`, several times faster than a singular value decomposition: `sigma_i = |M v_i|`, accurate to
        `eps sigma_1^2 / sigma_i`.

        Args:
            L_P (`torch.Tensor` of shape `(..., N, N)`): Factor of the controllability Gramian, float64 or complex128.
            L_Q (`torch.Tensor` of shape `(..., N, N)`): Factor of the observability Gramian, float64 or complex128.
            resolution (`float`, *optional*, defaults to 0.0): Share of `sigma_1` down to which singular values are
                needed; 0, or at least [`FINEST_RESOLUTION`].

        Raises:
            DimensionError: The shapes or devices differ.
            NotFiniteError: A factor, or their product, holds NaN or infinity.
        """
        require_same_shape(L_P, L_Q)
        if L_P.dtype != L_Q.dtype:  # a real Gramian paired with a complex one
            L_P, L_Q = L_P.to(torch.complex128), L_Q.to(torch.complex128)
        product = L_Q.mH @ L_P
        require_finite("the product L_Q^H L_P of the Gramian factors", product)
        if resolution >= FINEST_RESOLUTION:
            return cls(L_P, L_Q, *_svd_by_eigenvectors(product), resolution)
        U, sigma, Vh = svd(product)
        return cls(L_P, L_Q, U, sigma, Vh.mH)

    @property
    def usable_rank(self) -> torch.Tensor:
        """How many Hankel singular values stand above rounding, `sigma_r > N eps sigma_1`: int64 of shape `(...)`.

        Of a decomposition with a resolution, those count that stand above the resolution.

        It is 0 for a system whose output does not depend on its input. For measured Gramians the directions beyond it
        are made of rounding errors; a diagonal system may have some of them right, but what they add is below the
        rounding of what the others give.
        """
        floor = max(self.sigma.shape[-1] * torch.finfo(torch.float64).eps, self.resolution)
        return (self.sigma > floor * self.sigma[..., :1]).sum(-1)


def _svd_by_eigenvectors(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, sigma and V of a matrix, from the eigenvectors of its Hermitian square."""
    size = product.abs().amax(dim=(-2, -1), keepdim=True)
    scaled = product / torch.where(size > 0, size, 1)
    V = eigh(scaled.mH @ scaled).eigenvectors
    images = scaled @ V
    sigma, order = torch.linalg.vector_norm(images, dim=-2).sort(dim=-1, descending=True)
    order = order.unsqueeze(-2).expand_as(V)
    V, images, length = V.gather(-1, order), images.gather(-1, order), sigma.unsqueeze(-2)
    return images / torch.where(length > 0, length, 1), sigma * size.squeeze(-1), V


def hankel_decomposition(P: torch.Tensor, Q: torch.Tensor) -> HankelDecomposition:
    """The square-root decomposition of a pair of Gramians; see [`hankel_singular_values`] for arguments and errors."""
    require_same_shape(P, Q)
    return HankelDecomposition.from_factors(gramian_factor(P, "P"), gramian_factor(Q, "Q"))


def hankel_singular_values(P: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Hankel singular values `sigma_i = sqrt(eig_i(P Q))` of a pair of Gramians, by the square-root method.

    They do not depend on the basis of the state. Source: Moore (1981) for balancing and its singular values; Laub,
    Heath, Paige and Ward (1987) for the method.

    A Gramian in double precision holds its small directions to `eps` of its large ones, and `sigma` is a square root,
    so small values are less exact: the relative error grows as `sigma_i` falls. For a system whose poles are known,
    [`DiagonalLTI.hankel_singular_values`] has no such limit.

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): Controllability Gramian, or a measured state covariance: real
            symmetric or Hermitian, positive semidefinite. Any dtype; promoted to float64 or complex128.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian, in the same form.

    Returns:
        `torch.Tensor` of shape `(..., N)`, float64: descending and non-negative, on the Gramians' device.

    Raises:
        DimensionError: The shapes are not `(..., N, N)`, or differ.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A matrix is not Hermitian or clearly indefinite.

    Example:

    ```python
    >>> import torch
    >>> hankel_singular_values(torch.diag(torch.tensor([1.0, 16.0])), torch.diag(torch.tensor([4.0, 1.0])))
    tensor([4., 2.], dtype=torch.float64)

    ```
    """
    return hankel_decomposition(P, Q).sigma
