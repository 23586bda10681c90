"""Qwen3.5: transformers' `Qwen3_5GatedDeltaNet`, in text models and inside of models that also see.

Source of the model: Qwen Team, `Qwen/Qwen3.5-27B` and others on the Hugging Face Hub.
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from .gated_delta_net import JointLayer


@register
class Qwen3_5Layer(JointLayer):
    """A layer of Qwen3.5, seen as a state-space system a key head."""

    family = "qwen3_5"
    stock = STOCK_FAMILIES[family]


register_delta_rule(Qwen3_5Layer.stock.modeling)
