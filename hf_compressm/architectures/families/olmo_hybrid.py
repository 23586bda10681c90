"""Olmo Hybrid: transformers' `OlmoHybridGatedDeltaNet`, whose beta may be up to two.

Source of the model: Ai2, `allenai/Olmo-Hybrid-7B` on the Hugging Face Hub.
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from .gated_delta_net import SeparateLayer


@register
class OlmoHybridLayer(SeparateLayer):
    """A layer of Olmo Hybrid, seen as a state-space system a key head."""

    family = "olmo_hybrid"
    stock = STOCK_FAMILIES[family]


register_delta_rule(OlmoHybridLayer.stock.modeling)
