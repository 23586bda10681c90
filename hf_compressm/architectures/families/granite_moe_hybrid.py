"""GraniteMoeHybrid: transformers' `GraniteMoeHybridMambaLayer`, a Mamba-2 mixer between attention and expert layers.

Source of the model: IBM, 2025, Granite 4.0 language models
(https://huggingface.co/docs/transformers/model_doc/granitemoehybrid).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class GraniteMoeHybridLayer(MultiHeadLayer):
    """A GraniteMoeHybrid mixer, seen as a state-space system."""

    family = "granite_moe_hybrid"
    stock = STOCK_FAMILIES[family]


register_chunk_scan(GraniteMoeHybridLayer.stock.modeling)
