"""A truncation together with what calibration data show of the layer besides its Gramians."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ..errors import DimensionError
from ..systems import Truncation


@dataclass(frozen=True, eq=False)
class MeasuredTruncation(Truncation):
    """
    A truncation of a selective layer, with the mean squares of its B and C.

    A layer with a norm over the states needs them: a norm over the kept states alone divides by another number.

    Args:
        squares (`torch.Tensor` of shape `(..., 2, N)`, *optional*): Mean square over sequences and steps of each full
            state's entry of B, and of C.

    Raises:
        [`~errors.DimensionError`]: `squares` has another shape.
    """

    squares: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (*self.T.shape[:-2], 2, self.full_size)
        if self.squares is not None and tuple(self.squares.shape) != expected:
            raise DimensionError(f"squares have shape {tuple(self.squares.shape)}; they must be {expected}.")

    @classmethod
    def of(cls, truncation: Truncation, squares: torch.Tensor | None) -> MeasuredTruncation:
        """Add mean squares to a truncation."""
        return cls(**{field.name: getattr(truncation, field.name) for field in fields(Truncation)}, squares=squares)
