"""Bamba: transformers' `BambaMixer`, a Mamba-2 mixer between attention layers.

Source of the model: IBM, Princeton, CMU and UIUC, 2024, "Bamba: Inference-Efficient Hybrid Mamba2 Model"
(https://huggingface.co/blog/bamba).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class BambaLayer(MultiHeadLayer):
    """A Bamba mixer, seen as a state-space system."""

    family = "bamba"
    stock = STOCK_FAMILIES[family]


register_chunk_scan(BambaLayer.stock.modeling)
