"""Zamba2: transformers' `Zamba2MambaMixer`, a Mamba-2 mixer between shared attention layers.

Source of the layer: Glorioso et al., 2024, "The Zamba2 Suite: Technical Report" (arXiv 2411.15242).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class Zamba2Layer(MultiHeadLayer):
    """A Zamba2 Mamba-2 mixer, seen as a state-space system."""

    family = "zamba2"
    stock = STOCK_FAMILIES[family]


register_chunk_scan(Zamba2Layer.stock.modeling)
