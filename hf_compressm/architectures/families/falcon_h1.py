"""Falcon-H1: transformers' `FalconH1Mixer`, a Mamba-2 mixer beside attention in every layer.

Its output of `in_proj` is multiplied by a constant vector (`mup_vector`), with one value for all of B and one for all
of C, which has to be as long as the projection.

Source of the layer: Zuo et al., 2025, "Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and
Performance" (arXiv 2507.22448).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...systems import registered_reductors
from ..changes import AttributeChange
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class FalconH1Layer(MultiHeadLayer):
    """A Falcon-H1 mixer, seen as a state-space system."""

    family = "falcon_h1"
    mixer_names = frozenset({"FalconH1Mixer"})
    config_size_name = "mamba_d_state"

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """Only where states are mixed: transformers sets the multipliers of all layers for one projected size."""
        mixes = not registered_reductors()[reductor].only_selects
        return mixes and super().sizes_may_differ(stock, reductor)

    def _stock_changes(self, size: int) -> list[AttributeChange]:
        """The sizes of a Mamba-2 mixer, the joint size of all groups, and the multipliers of the projection."""
        changes = super()._stock_changes(size)
        if hasattr(self.module, "groups_time_state_size"):
            changes.append(AttributeChange(self.module, "groups_time_state_size", self.groups * size))
        if isinstance(getattr(self.module, "mup_vector", None), Tensor):
            changes.append(AttributeChange(self.module, "mup_vector", self._multipliers(size)))
        return changes

    def _multipliers(self, size: int) -> Tensor:
        vector, width = self.module.mup_vector, self.groups * self.projected_size
        rest = vector.shape[-1] - 2 * width - self.heads
        before, B, C, after = vector.split([rest, width, width, self.heads], dim=-1)
        B, C = (part[..., :1].expand(*part.shape[:-1], self.groups * size) for part in (B, C))
        return torch.cat([before, B, C, after], dim=-1)


register_chunk_scan("transformers.models.falcon_h1.modeling_falcon_h1")
