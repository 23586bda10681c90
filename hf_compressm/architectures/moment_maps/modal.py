r"""How the moments of parameters that belong to the modes of a time-invariant layer move under a cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import DimensionError
from .axis import AxisMap, rows_of_identity


@dataclass(frozen=True)
class ModalMap(AxisMap):
    r"""
    An [`AxisMap`] whose matrix may be complex, and another one in each channel.

    A complex parameter is a real tensor with real and imaginary part on a last axis of length 2; its gradient
    \\( g_{re} + i g_{im} \\) moves with \\( M \\), the moments of both parts together. Second moments move with the
    squares of the real and of the imaginary part of \\( M \\): with independent entries,
    \\( v_{re} \leftarrow M_{re}^2 v_{re} + M_{im}^2 v_{im} \\) and \\( v_{im} \leftarrow M_{im}^2 v_{re} + M_{re}^2
    v_{im} \\), squares taken entry by entry.

    Args:
        axis (`int`): The axis of the parameter that changes its length.
        matrix (`torch.Tensor` of shape `(new, old)` or `(channels, new, old)`): The map \\( M \\), float64 or
            complex128. Channels are the parameter's first axis.
        kept (`torch.Tensor` of shape `(new,)` or `(channels, new)`, int64, *optional*): The old entry that each new one
            stands for; the leading ones when unset.
        has_pairs (`bool`, *optional*, defaults to `False`): Whether the parameter is complex, with a last axis of
            length 2.
    """

    has_pairs: bool = False

    # A factored second moment (Adafactor's) has lost the axis of the pairs or that of the channels.
    moves_factors: ClassVar[bool] = False

    def sliced(self) -> ModalMap:
        """The map that only picks the kept entries."""
        new, old = self.matrix.shape[-2:]
        kept = torch.arange(new, device=self.matrix.device) if self.kept is None else self.kept
        return replace(self, matrix=rows_of_identity(kept, old), kept=kept)

    def first(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a first moment (any float dtype, `old` entries along the axis); the result has the moment's dtype."""
        return self._moved(moment, lambda pair, M: pair @ _as_real(M))

    def second(self, moment: Tensor, axis: int | None = None) -> Tensor:
        """Map a second moment (any float dtype, `old` entries along the axis); the result has the moment's dtype."""
        return self._moved(moment, lambda pair, M: pair @ _as_real(M).square())

    def _moved(self, moment: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        old = self.matrix.shape[-1]
        if moment.shape[self.axis] != old:
            raise DimensionError(
                f"a moment of shape {tuple(moment.shape)} has {moment.shape[self.axis]} entries along axis "
                f"{self.axis}; the map takes {old}."
            )
        M = self.matrix.to(device=moment.device)
        pair = (
            moment.double() if self.has_pairs else torch.stack([moment.double(), torch.zeros_like(moment.double())], -1)
        )
        # (..., old, 2) to (..., 2 * old) and, with channels in front, one more axis for the product.
        rows = pair.movedim(self.axis, -2).flatten(-2)
        moved = apply(rows.unsqueeze(-2), M).squeeze(-2) if M.ndim == 3 else apply(rows, M)
        moved = moved.unflatten(-1, (-1, 2)).movedim(-2, self.axis)
        return (moved if self.has_pairs else moved[..., 0]).to(moment.dtype).contiguous()


def _as_real(M: Tensor) -> Tensor:
    """
    The real matrix that multiplies interleaved rows (re, im, re, im, ...) from the right as M does from the left.

    M: (..., new, old).  Returns: (..., 2 old, 2 new) float64.
    """
    M = M.to(torch.complex128).mT
    blocks = torch.stack([torch.stack([M.real, M.imag], -1), torch.stack([-M.imag, M.real], -1)], -2)
    # (..., old, new, 2 from, 2 to)
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
