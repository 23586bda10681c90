"""How gradients move between a projection's entries and the matrices that mix them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixingMap:
    """
    How the gradient of a mixing matrix, and with it the optimizer's moments, moves when its columns are combined.

    Args:
        matrix (`torch.Tensor` of shape `(..., new, old)`, float64): The map of the columns' gradients.
        axis (`int`): The last axis of the parameter.
    """

    matrix: Tensor
    axis: int

    moves_factors: ClassVar[bool] = False
    """Whether the map also moves factors of a second moment."""

    def sliced(self) -> MixingMap:
        """The map that only picks the leading columns."""
        new, old = self.matrix.shape[-2:]
        picked = torch.eye(new, old, dtype=self.matrix.dtype, device=self.matrix.device)
        return replace(self, matrix=picked.expand_as(self.matrix))

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a first moment of the parameter's shape; the result has the moment's dtype."""
        return (moment.to(self.matrix) @ self.matrix.mT).to(moment)

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a second moment of the parameter's shape; the result has the moment's dtype."""
        return (moment.to(self.matrix) @ self.matrix.square().mT).to(moment)
