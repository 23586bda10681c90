"""
Moment maps: how a parameter's gradient, and with it what an optimizer keeps of it, moves when the parameter is cut.

Each has an `axis`, says by `moves_factors` whether it maps factored second moments too, and maps first and second
moments; `sliced` is the map that only picks entries. [`ModalMap`] is another one, for complex states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import DimensionError


def rows_of_identity(indices: Tensor, size: int) -> Tensor:
    """The rows of the identity that pick the given entries, `(..., len(indices), size)` float64."""
    return torch.nn.functional.one_hot(indices, size).to(torch.float64)


@dataclass(frozen=True)
class AxisMap:
    r"""
    How a parameter's gradient, and with it the optimizer's moments, moves when one of its axes is cut.

    If the old gradient is \\( g \\), the gradient of the new parameter is \\( M g \\) along the axis. First moments
    are averages of gradients and move the same way. Second moments are averages of squares; if the entries were
    independent they would move with \\( M \circ M \\). That keeps them non-negative, and is somewhat too small where
    states are alike and their gradients agree.

    Args:
        axis (`int`): The axis of the parameter that changes its length.
        matrix (`torch.Tensor` of shape `(new, old)` or `(blocks, new, old)`, float64): The map \\( M \\), or one for
            each entry along axis 0 of the parameter.
        kept (`torch.Tensor` of shape `(new,)` or `(blocks, new)`, int64, *optional*): The old entry that each new one
            stands for; the leading ones when unset.
    """

    axis: int
    matrix: Tensor
    kept: Tensor | None = None

    moves_factors: ClassVar[bool] = True
    """Whether the map also moves factors of a second moment (Adafactor's), which lack one of the other axes."""

    def sliced(self) -> AxisMap:
        """The map that only picks the kept entries."""
        new, old = self.matrix.shape[-2:]
        kept = torch.arange(new, device=self.matrix.device) if self.kept is None else self.kept
        kept = kept.expand(*self.matrix.shape[:-2], new)
        return AxisMap(self.axis, rows_of_identity(kept, old), kept)

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a first moment (any float dtype, `old` entries along the axis); the result has the moment's dtype."""
        return self._along_axis(self.matrix, moment, axis)

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a second moment (any float dtype, `old` entries along the axis); the result has the moment's dtype."""
        return self._along_axis(self.matrix.square(), moment, axis)

    def _along_axis(self, matrix: Tensor, moment: Tensor, axis: int | None) -> Tensor:
        axis = self.axis if axis is None else axis
        if moment.shape[axis] != matrix.shape[-1]:
            raise DimensionError(
                f"a moment of shape {tuple(moment.shape)} has {moment.shape[axis]} entries along axis {axis}; "
                f"the map takes {matrix.shape[-1]}."
            )
        rows = moment.to(matrix.dtype).movedim(axis, -1)
        equation = "...o,no->...n" if matrix.ndim == 2 else "b...o,bno->b...n"
        mapped = torch.einsum(equation, rows, matrix.to(device=moment.device))
        return mapped.movedim(-1, axis).to(moment.dtype).contiguous()


@dataclass(frozen=True)
class AxisSelection:
    """
    How a parameter's gradient, and with it the optimizer's moments, moves when entries along an axis are picked.

    It does what an [`AxisMap`] with rows of the identity does, without a matrix of the length squared.

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


@dataclass(frozen=True)
class Rescaling:
    """
    How a parameter's gradient, and with it the optimizer's moments, moves when the parameter is multiplied by a number.

    Args:
        factor (`float`): What the gradient is multiplied by, the inverse of what the parameter is multiplied by.
    """

    factor: float

    # No axis changes its length; factors of a second moment (Adafactor's) all scale alike.
    axis: ClassVar[int] = -1
    moves_factors: ClassVar[bool] = True

    def sliced(self) -> Rescaling:
        """The map that leaves moments as they are."""
        return Rescaling(1.0)

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Rescale a first moment."""
        return torch.mul(moment, self.factor)

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Rescale a second moment, or a factor of one."""
        return torch.mul(moment, self.factor**2)
