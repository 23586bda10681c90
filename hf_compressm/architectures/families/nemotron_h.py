"""Nemotron-H: transformers' `NemotronHMamba2Mixer`, a Mamba-2 mixer between attention and feed-forward layers.

Source of the layer: NVIDIA, 2025, "Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models"
(arXiv 2504.03624).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class NemotronHLayer(MultiHeadLayer):
    """A Nemotron-H Mamba-2 mixer, seen as a state-space system."""

    family = "nemotron_h"
    stock = STOCK_FAMILIES[family]


register_chunk_scan(NemotronHLayer.stock.modeling)
