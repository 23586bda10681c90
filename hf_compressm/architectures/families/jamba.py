"""Jamba: transformers' `JambaMambaMixer`, a Mamba mixer with trained norms, between attention and expert layers.

Source of the layer: Lieber et al., 2024, "Jamba: A Hybrid Transformer-Mamba Language Model" (arXiv 2403.19887).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.mixer import register_mixer
from ..scans.selective import register_selective_scan
from .normed_mamba import NormedMambaLayer


@register
class JambaLayer(NormedMambaLayer):
    """A Jamba Mamba mixer, seen as a state-space system."""

    family = "jamba"
    stock = STOCK_FAMILIES[family]


register_selective_scan(JambaLayer.stock.modeling)
register_mixer(JambaLayer.stock.modeling, JambaLayer.stock.mixer)
