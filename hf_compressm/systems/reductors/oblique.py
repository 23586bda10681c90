r"""Oblique truncation of a delta rule: balanced `T` and `W`, whose erase vector is another one than its key.

Error bound: none known. Under \\( h \approx T h_r, h_r = W^\top h \\) a transition \\( I - \beta k k^\top \\) becomes
\\( I - \beta (W^\top k)(T^\top k)^\top \\). All of its eigenvalues are 1 but one, \\( 1 - \beta k^\top T W^\top k \\),
which nothing keeps from -1 to 1: it is measured.
"""

from __future__ import annotations

import torch

from ...errors import DimensionError, TruncationError
from .._validation import require_finite, to_double
from ..hankel import HankelDecomposition, hankel_decomposition
from ..truncation import Truncation
from .balanced_each import balancing_truncation_of_each


def erased_shares(truncation: Truncation, keys: torch.Tensor) -> torch.Tensor:
    r"""\\( \beta k^\top T W^\top k \\): which share of what lies under a key its step erases.

    One minus a share is the eigenvalue of the step's transition that is not 1, so a step is stable where its share is
    from 0 to 2. Where `T = W` is orthonormal it is from 0 to \\( \beta |k|^2 \\).

    Args:
        truncation ([`Truncation`]): Real, for one state or for each of a batch.
        keys (`torch.Tensor` of shape `(..., samples, N)`): Keys after their norm, each times \\( \sqrt{\beta} \\).

    Returns:
        `torch.Tensor` of shape `(..., samples)`, float64.

    Raises:
        DimensionError: The keys are not of the truncation's size.
        NotFiniteError: A key is NaN or infinite.

    Example:

    ```python
    >>> import torch
    >>> erased_shares(Truncation.from_indices([0], full_size=2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    tensor([1.0000, 0.3600], dtype=torch.float64)

    ```
    """
    if keys.ndim < 2 or keys.shape[-1] != truncation.full_size:
        raise DimensionError(
            f"keys have shape {tuple(keys.shape)}; for this truncation they must be (..., samples, "
            f"{truncation.full_size})."
        )
    require_finite("keys", keys)
    keys, T, W = to_double(keys), to_double(truncation.T), to_double(truncation.W)
    return ((keys @ T) * (keys @ W)).sum(-1)


@torch.no_grad()
def oblique_truncation(
    P: torch.Tensor,
    Q: torch.Tensor,
    r: int,
    keys: torch.Tensor,
    tolerance: float = 0.05,
    decomposition: HankelDecomposition | None = None,
) -> Truncation:
    r"""The balanced `T` and `W` of a delta rule's Gramians, where every key that was seen keeps its step stable.

    A product of stable steps may still grow for a while, as it may with any oblique projection.

    Source of the coordinates: Rowley, 2005, "Model reduction for fluids, using balanced proper orthogonal
    decomposition".

    Args:
        P (`torch.Tensor` of shape `(..., N, N)`): State covariance, real.
        Q (`torch.Tensor` of shape `(..., N, N)`): Observability Gramian, in the same form.
        r (`int`): Number of directions to keep, from 1 to N.
        keys (`torch.Tensor` of shape `(..., samples, N)`): As in [`erased_shares`], from the data of the Gramians.
        tolerance (`float`, *optional*, defaults to 0.05): How far beyond -1 and 1 an eigenvalue may lie: a step that
            grows a little is followed by decays.
        decomposition ([`HankelDecomposition`], *optional*): That of the two Gramians, where it is known already.

    Returns:
        [`Truncation`]: As of [`balancing_truncation_of_each`].

    Raises:
        DimensionError, NotFiniteError, ConfigurationError: As in [`erased_shares`] and
            [`balancing_truncation_of_each`].
        TruncationError: No pair has a usable Hankel singular value, or a key's step would be unstable: take
            [`orthonormal_truncation`] there.

    Example:

    ```python
    >>> import torch
    >>> P, Q = torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)
    >>> oblique_truncation(P, Q, 1, keys=torch.eye(2)).T.abs()
    tensor([[1.],
            [0.]], dtype=torch.float64)

    ```
    """
    known = hankel_decomposition(P, Q) if decomposition is None else decomposition
    truncation = balancing_truncation_of_each(known, r)
    shares = erased_shares(truncation, keys)
    if shares.numel() and (shares.min() < -tolerance or shares.max() > 2 + tolerance):
        raise TruncationError(
            f"with {r} of {truncation.full_size} states the oblique form has steps with an eigenvalue from "
            f"{1 - shares.max().item():.3g} to {1 - shares.min().item():.3g} on the calibration data; stable are -1 to "
            "1. Use the orthonormal form, which is stable for every key."
        )
    return truncation
