"""Qwen3-Next: transformers' `Qwen3NextGatedDeltaNet`, gated DeltaNet between layers of full attention.

Source of the model: Qwen Team, `Qwen/Qwen3-Next-80B-A3B-Instruct` on the Hugging Face Hub.
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from .gated_delta_net import InterleavedLayer


@register
class Qwen3NextLayer(InterleavedLayer):
    """A layer of Qwen3-Next, seen as a state-space system a key head."""

    family = "qwen3_next"
    stock = STOCK_FAMILIES[family]


register_delta_rule(Qwen3NextLayer.stock.modeling)
