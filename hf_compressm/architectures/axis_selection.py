"""`AxisSelection`: the moment map of a parameter of which some rows are kept as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import DimensionError


@dataclass(frozen=True)
class AxisSelection:
    """
    How a parameter's gradient, and with it the optimizer's moments, moves when entries along an axis are picked.

    It does what an [`~architectures.AxisMap`] with rows of the identity does, without a matrix of the length squared.

    Args:
        axis (`int`): The axis of the parameter that changes its length.
        kept (`torch.Tensor` of shape `(new,)`, int64): The old entry that each new one is.
        length (`int`): The old length of the axis.
    """

    axis: int
    kept: Tensor
    length: int

    moves_factors: ClassVar[bool] = True
    """Whether the map also moves factors of a second moment (Adafactor's), which lack one of the other axes."""

    def sliced(self) -> AxisSelection:
        """The map itself, which only picks entries."""
        return self

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Pick the entries of a first moment (`length` entries along the axis)."""
        axis = self.axis if axis is None else axis
        if moment.shape[axis] != self.length:
            raise DimensionError(
                f"a moment of shape {tuple(moment.shape)} has {moment.shape[axis]} entries along axis {axis}; "
                f"the map takes {self.length}."
            )
        return moment.index_select(axis, self.kept.to(moment.device))

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Pick the entries of a second moment (`length` entries along the axis)."""
        return self.first(moment, axis)
