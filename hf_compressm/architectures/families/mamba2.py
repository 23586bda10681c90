"""Mamba-2: transformers' `Mamba2Mixer` and mamba-ssm's `Mamba2`.

Source of the layer: Dao and Gu, 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality" (arXiv 2405.21060).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.multi_head import register_chunk_scan
from .multi_head import MultiHeadLayer


@register
class Mamba2Layer(MultiHeadLayer):
    """A Mamba-2 mixer of transformers or of mamba-ssm, seen as a state-space system."""

    family = "mamba2"
    stock = STOCK_FAMILIES[family]
    other_mixers = frozenset({"Mamba2"})


register_chunk_scan(Mamba2Layer.stock.modeling)
