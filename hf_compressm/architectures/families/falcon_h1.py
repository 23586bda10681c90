"""Falcon-H1: transformers' `FalconH1Mixer`, a Mamba-2 mixer beside attention in every layer.

Its output of `in_proj` is multiplied by a constant vector (`mup_vector`), with one value for all of B and one for all
of C, which has to be as long as the projection.

Source of the layer: Zuo et al., 2025, "Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and
Performance" (arXiv 2507.22448).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...models.compressed.stock_families import STOCK_FAMILIES
from ...systems import registered_reductors
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from ..state_layout import SizeAttribute, StateLayout, runs
from .multi_head import MultiHeadLayer


@register
class FalconH1Layer(MultiHeadLayer):
    """A Falcon-H1 mixer, seen as a state-space system."""

    family = "falcon_h1"
    stock = STOCK_FAMILIES[family]
    projections_may_differ = False

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """Only where states are mixed: transformers sets the multipliers of all layers for one projected size."""
        mixes = not registered_reductors()[reductor].only_selects
        return mixes and super().sizes_may_differ(stock, reductor)

    @property
    def stock_layout(self) -> StateLayout:
        """That of a Mamba-2 mixer, with the joint size of all groups and the multipliers of the projection."""
        layout, attributes = super().stock_layout, []
        if hasattr(self.module, "groups_time_state_size"):
            attributes.append(SizeAttribute("", "groups_time_state_size", runs("B", self.groups)))
        if isinstance(getattr(self.module, "mup_vector", None), Tensor):
            attributes.append(SizeAttribute("", "mup_vector", layout.by_name["in_proj.weight"].entries))
        return replace(layout, attributes=(*layout.attributes, *attributes))


register_chunk_scan(FalconH1Layer.stock.modeling)
