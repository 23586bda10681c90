"""A truncation together with what calibration data show of the layer besides its Gramians."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from ..errors import DimensionError
from ..systems import Truncation
from .projection_rows import ProjectionRows


@dataclass(frozen=True, eq=False)
class MeasuredTruncation(Truncation):
    """
    A truncation of a selective layer, with the mean squares of its B and C, and the rows that its projections keep.

    A layer with a norm over the states needs the squares: a norm over the kept states alone divides by another number.

    Args:
        squares (`torch.Tensor` of shape `(..., 2, N)`, *optional*): Mean square over sequences and steps of each full
            state's entry of B, and of C.
        rows ([`ProjectionRows`], *optional*): What the projections of a layer that mixes states keep; all when unset.

    Raises:
        [`~errors.DimensionError`]: `squares` has another shape.
    """

    squares: torch.Tensor | None = None
    rows: ProjectionRows | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (*self.T.shape[:-2], 2, self.full_size)
        if self.squares is not None and tuple(self.squares.shape) != expected:
            raise DimensionError(f"squares have shape {tuple(self.squares.shape)}; they must be {expected}.")

    @classmethod
    def of(cls, truncation: Truncation, squares: torch.Tensor | None = None) -> MeasuredTruncation:
        """Add mean squares to a truncation."""
        return cls(**{field.name: getattr(truncation, field.name) for field in fields(Truncation)}, squares=squares)

    def with_rows(self, rows: ProjectionRows) -> MeasuredTruncation:
        """The same for a layer whose projections keep some rows."""
        return replace(self, rows=rows)

    def fingerprint(self) -> str:
        """A digest of every number in `T`, `W` and `rows`."""
        known = super().fingerprint()
        return known if self.rows is None else f"{known}-{self.rows.fingerprint()}"


def rows_of(truncation: Truncation) -> ProjectionRows | None:
    """The rows that the projections keep; None where they stay as they are."""
    return truncation.rows if isinstance(truncation, MeasuredTruncation) else None
