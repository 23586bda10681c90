"""FalconMamba: transformers' `FalconMambaMixer`, a Mamba mixer with norms of B, C and the time step without weights.

Source of the layer: Zuo et al., 2024, "Falcon Mamba: The First Competitive Attention-free 7B Language Model"
(arXiv 2410.05355).
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.mixer import register_mixer
from ..scans.selective import register_selective_scan
from .normed_mamba import NormedMambaLayer


@register
class FalconMambaLayer(NormedMambaLayer):
    """A FalconMamba mixer, seen as a state-space system."""

    family = "falcon_mamba"
    stock = STOCK_FAMILIES[family]


register_selective_scan(FalconMambaLayer.stock.modeling)
register_mixer(FalconMambaLayer.stock.modeling, FalconMambaLayer.stock.mixer)
