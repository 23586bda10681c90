"""Which rows the projections of a mixed layer keep, and how what the others gave is rebuilt from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import DimensionError


@dataclass(frozen=True, eq=False)
class KeptRows:
    r"""
    The rows that one projection keeps, in each group of heads.

    With \\( b \approx T b_S \\) for the entries \\( b_S \\) of the kept rows, a mixing matrix \\( W \\) of all rows
    becomes \\( T^\top W \\), whatever it was.

    Args:
        indices (`torch.Tensor` of shape `(..., M)`, int64): The kept rows, ascending.
        T (`torch.Tensor` of shape `(..., N, M)`, float64): Rebuilds all entries from those that the kept rows give.
        gain (`torch.Tensor` of shape `(..., M)`, float64, *optional*): What the entries of the kept rows are multiplied
            by, on average, when the others are gone, as a norm over fewer entries does; one when unset.

    Raises:
        [`~errors.DimensionError`]: the shapes do not fit, or the rows are out of range or not ascending.
    """

    indices: Tensor
    T: Tensor
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (*self.T.shape[:-2], self.T.shape[-1])
        if self.T.ndim < 2 or tuple(self.indices.shape) != expected or self.T.shape[-1] > self.T.shape[-2]:
            raise DimensionError(
                f"indices have shape {tuple(self.indices.shape)} and T {tuple(self.T.shape)}; they must be (..., M) "
                "and (..., N, M) with M at most N."
            )
        out_of_range = (self.indices < 0).any() or (self.indices >= self.T.shape[-2]).any()
        if out_of_range or (self.indices.diff(dim=-1) <= 0).any():
            raise DimensionError(
                f"rows {self.indices.tolist()} are not distinct rows of {self.T.shape[-2]}, ascending."
            )

    def fold(self, mixing: Tensor) -> Tensor:
        """The mixing matrix that reads the kept rows as another, `(..., N, r)`, reads all; float64."""
        return self.T.to(mixing.device).mT @ mixing.double()

    def to(self, device: torch.device | str) -> KeptRows:
        """The same on a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: None if value is None else value.to(device) for name, value in tensors.items()})


@dataclass(frozen=True, eq=False)
class ProjectionRows:
    """
    The rows that the projections of B and C keep, each its own.

    Args:
        B ([`KeptRows`]): Those of B.
        C ([`KeptRows`]): Those of C.

    Raises:
        [`~errors.DimensionError`]: the two are not of one size.
    """

    B: KeptRows
    C: KeptRows

    def __post_init__(self) -> None:
        if self.B.T.shape != self.C.T.shape:
            raise DimensionError(
                f"B keeps rows by a T of shape {tuple(self.B.T.shape)} and C by {tuple(self.C.T.shape)}; a layer has "
                "one projected size."
            )

    @property
    def count(self) -> int:
        """How many rows each keeps (in every group), M."""
        return self.B.T.shape[-1]

    @property
    def full_count(self) -> int:
        """How many there were, N."""
        return self.B.T.shape[-2]

    @property
    def by_role(self) -> dict[str, Tensor]:
        """The kept rows, as a [`StateLayout`] takes them."""
        return {"B": self.B.indices, "C": self.C.indices}

    def to(self, device: torch.device | str) -> ProjectionRows:
        """The same on a device."""
        return ProjectionRows(self.B.to(device), self.C.to(device))

    def fingerprint(self) -> str:
        """A digest of every number: equal ones are equal bit by bit."""
        digest = hashlib.sha256()
        for side in (self.B, self.C):
            for tensor in (side.indices, side.T):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
