"""Qwen3.5 with experts: transformers' `Qwen3_5MoeGatedDeltaNet`.

Source of the model: Qwen Team, `Qwen/Qwen3.5-35B-A3B` on the Hugging Face Hub.
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from .gated_delta_net import JointLayer


@register
class Qwen3_5MoeLayer(JointLayer):
    """A layer of Qwen3.5 with experts, seen as a state-space system a key head."""

    family = "qwen3_5_moe"
    stock = STOCK_FAMILIES[family]


register_delta_rule(Qwen3_5MoeLayer.stock.modeling)
