"""`Truncation`: which states a reduced system keeps, as plain data that checks itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from ..errors import DimensionError, TruncationError
from ._validation import clear_deviation, require_finite


@dataclass(frozen=True, eq=False)
class Truncation:
    """A Petrov-Galerkin projection of a state: `h ~ T h_r` with `h_r = W^H h` and `W^H T = I`.

    A reduced system is `(W^H A T, W^H B, C T, D)`. Every reductor of this package returns one, and whoever applies it
    needs to know nothing of how it was found. Source: Antoulas, *Approximation of Large-Scale Dynamical
    Systems* (2005).

    Args:
        T (`torch.Tensor` of shape `(..., N, r)`): Reconstruction of the full state.
        W (`torch.Tensor` of shape `(..., N, r)`): Test functions, of `T`'s dtype and on its device.
        indices (`torch.Tensor` of shape `(..., r)` and dtype int64, *optional*): The kept states in ascending order,
            when `W` is columns of the identity, `h_r = h[indices]`. The rows of `T` outside `indices` then say how the
            dropped states are rebuilt from the kept ones.
        shares (`torch.Tensor` of shape `(..., r, N)`, *optional*): Which share of each full state's variance each kept
            state carries, where a reductor knows it; the identity on kept states. A quantity that belongs to single
            states and is summed over them moves with it.
        active (`torch.Tensor` of shape `(..., r)` and dtype bool, *optional*): False for inert states, whose columns of
            `T` and `W` are zero: nothing reaches them and nothing reads them. They fill a batch up to one size. All
            states are active when unset.

    Raises:
        DimensionError: Shapes, dtypes or devices do not fit, or `indices` are out of range, repeated or unsorted.
        NotFiniteError: `T` or `W` holds NaN or infinity.
        TruncationError: `W^H T` differs from the identity, or `W` is not the columns of the identity that `indices`
            names.

    Example:

    ```python
    >>> truncation = Truncation.from_indices([0, 2], full_size=3)
    >>> truncation.state_size, truncation.full_size, truncation.is_selection
    (2, 3, True)

    ```
    """

    T: torch.Tensor
    W: torch.Tensor
    indices: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    active: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._require_shapes()
        require_finite("T", self.T)
        require_finite("W", self.W)
        if self.indices is not None:
            self._require_indices(self.indices)
        identity = torch.eye(self.state_size, dtype=self.T.dtype, device=self.T.device)
        if self.active is not None:
            self._require_active(self.active)
            identity = torch.diag_embed(self.active.to(self.T.dtype))
        deviation = (self.W.mH @ self.T - identity).abs().amax().item()
        allowed = clear_deviation(self.T)
        if not deviation <= allowed:
            raise TruncationError(
                f"W^H T differs from the identity by {deviation:.3g}; allowed is {allowed:.1g} in {self.T.dtype}. T "
                f"and W do not define a projection: reduce to fewer states, or leave this layer as it is."
            )

    def _require_shapes(self) -> None:
        T, W = self.T, self.W
        if T.ndim < 2 or T.shape != W.shape or not 1 <= T.shape[-1] <= T.shape[-2]:
            raise DimensionError(
                f"T has shape {tuple(T.shape)} and W {tuple(W.shape)}; both must be (..., N, r) with 1 <= r <= N."
            )
        if T.dtype != W.dtype or not (T.is_floating_point() or T.is_complex()):
            raise DimensionError(f"T is {T.dtype} and W {W.dtype}; both must have the same real or complex dtype.")
        if self.shares is not None and self.shares.shape != T.mT.shape:
            raise DimensionError(f"shares have shape {tuple(self.shares.shape)}; they must be {tuple(T.mT.shape)}.")
        if T.device != W.device:
            raise DimensionError(f"T is on {T.device} and W on {W.device}; move them to one device.")

    def _require_active(self, active: torch.Tensor) -> None:
        expected = (*self.T.shape[:-2], self.state_size)
        if active.dtype != torch.bool or tuple(active.shape) != expected or self.indices is not None:
            raise DimensionError(
                f"active has dtype {active.dtype} and shape {tuple(active.shape)}; it must be bool of shape "
                f"{expected}, and None where indices name the kept states."
            )
        if (self.T.abs().amax(-2) + self.W.abs().amax(-2))[~active].any():
            raise TruncationError("an inert state has an entry in T or W that is not zero.")

    def _require_indices(self, indices: torch.Tensor) -> None:
        _require_indices(indices, self.full_size)
        expected = (*self.T.shape[:-2], self.state_size)
        if tuple(indices.shape) != expected:
            raise DimensionError(
                f"indices have shape {tuple(indices.shape)}; with T of shape {tuple(self.T.shape)} they must be "
                f"{expected}."
            )
        if not torch.equal(self.W, _identity_columns(indices, self.full_size, self.W.dtype, self.W.device)):
            raise TruncationError(
                "W is not the columns of the identity that indices name; pass indices=None for a W of another kind."
            )

    @classmethod
    def from_indices(
        cls,
        indices: torch.Tensor | Sequence[int],
        full_size: int,
        T: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shares: torch.Tensor | None = None,
    ) -> Truncation:
        """The truncation that keeps some of the states as they are.

        Args:
            indices (`torch.Tensor` of shape `(..., r)`, or sequence of `int`): The kept states in ascending order.
            full_size (`int`): Number of states N before the truncation.
            T (`torch.Tensor` of shape `(..., N, r)`, *optional*): Reconstruction with `T[indices] = I`. Without it, the
                dropped states are taken to be zero.
            dtype (`torch.dtype`, *optional*): Of `T` and `W`. Defaults to that of `T`, or float64.
            device (`torch.device` or `str`, *optional*): Of `T` and `W`. Defaults to that of `T`, or of `indices`.
            shares (`torch.Tensor` of shape `(..., r, N)`, *optional*): See [`Truncation`].

        Raises:
            DimensionError, NotFiniteError, TruncationError: As in [`Truncation`].
        """
        if not isinstance(indices, torch.Tensor):
            indices = torch.tensor(list(indices), device=device or (None if T is None else T.device))
        device = device or (indices if T is None else T).device
        dtype = dtype or (torch.float64 if T is None else T.dtype)
        indices = indices.to(device)
        _require_indices(indices, full_size)
        W = _identity_columns(indices, full_size, dtype, indices.device)
        return cls(T=W.clone() if T is None else T.to(dtype=dtype, device=device), W=W, indices=indices, shares=shares)

    @property
    def state_size(self) -> int:
        """Number of states r after the truncation."""
        return self.T.shape[-1]

    @property
    def full_size(self) -> int:
        """Number of states N before the truncation."""
        return self.T.shape[-2]

    def to(self, device: torch.device | str) -> Truncation:
        """The same truncation with all of its tensors on a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: None if value is None else value.to(device) for name, value in tensors.items()})

    def fingerprint(self) -> str:
        """A digest of every number in `T` and `W`: equal ones are equal bit by bit."""
        digest = hashlib.sha256()
        for tensor in (self.T, self.W):
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def is_selection(self) -> bool:
        """Whether the kept states stay as they are and the dropped ones count as zero, so nothing has to be folded."""
        return self.indices is not None and torch.equal(self.T, self.W)


def _require_indices(indices: torch.Tensor, full_size: int) -> None:
    if indices.dtype != torch.int64 or indices.ndim < 1 or indices.shape[-1] == 0:
        raise DimensionError(
            f"indices have dtype {indices.dtype} and shape {tuple(indices.shape)}; they must be int64 of shape (..., "
            f"r) with r >= 1."
        )
    if (indices < 0).any() or (indices >= full_size).any() or (indices.diff(dim=-1) <= 0).any():
        raise DimensionError(
            f"indices {indices.tolist()} are not a set of states; each must be from 0 to {full_size - 1}, distinct, "
            f"and in ascending order."
        )


def _identity_columns(
    indices: torch.Tensor, full_size: int, dtype: torch.dtype, device: torch.device | None
) -> torch.Tensor:
    return torch.nn.functional.one_hot(indices, full_size).mT.to(dtype=dtype, device=device)
