"""How gradients move between a projection's entries and the matrices that mix them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixingMap:
    r"""
    How the gradient of a mixing matrix, and with it the optimizer's moments, moves when its columns are combined and
    rows of it go.

    A row's gradient is a sum over products with the entry that it reads. So that of a row that stays is what it was, or
    a multiple where its entry becomes one, as behind a norm over fewer entries.

    Args:
        matrix (`torch.Tensor` of shape `(..., new, old)`, float64): The map of the columns' gradients.
        axis (`int`): The last axis of the parameter.
        rows (`torch.Tensor` of shape `(..., M)`, int64, *optional*): The rows that stay; all when unset.
        gain (`torch.Tensor` of shape `(..., M)`, float64, *optional*): What the entry of each row that stays is
            multiplied by; one when unset.
    """

    matrix: Tensor
    axis: int
    rows: Tensor | None = None
    gain: Tensor | None = None

    moves_factors: ClassVar[bool] = False
    """Whether the map also moves factors of a second moment."""

    def sliced(self) -> MixingMap:
        """The map that only picks the leading columns, and the rows that stay."""
        new, old = self.matrix.shape[-2:]
        picked = torch.eye(new, old, dtype=self.matrix.dtype, device=self.matrix.device)
        return replace(self, matrix=picked.expand_as(self.matrix), gain=None)

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a first moment of the parameter's shape; the result has the moment's dtype."""
        return self._moved(moment, self.matrix, self.gain)

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a second moment of the parameter's shape; the result has the moment's dtype."""
        return self._moved(moment, self.matrix.square(), None if self.gain is None else self.gain.square())

    def _moved(self, moment: Tensor, matrix: Tensor, gain: Tensor | None) -> Tensor:
        moved = moment.to(matrix)
        if self.rows is not None:
            moved = moved.take_along_dim(self.rows.to(moved.device).unsqueeze(-1), dim=-2)
        if gain is not None:
            moved = moved * gain.to(moved).unsqueeze(-1)
        return (moved @ matrix.mT).to(moment)
