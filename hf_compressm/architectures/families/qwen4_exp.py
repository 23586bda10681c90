"""Qwen4-Exp: transformers' `Qwen4ExpTextGatedDeltaNet`.

Source of the model: Qwen Team, `Qwen/Qwen4-Exp` on the Hugging Face Hub.
"""

from __future__ import annotations

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from .gated_delta_net import JointLayer


@register
class Qwen4ExpLayer(JointLayer):
    """A layer of Qwen4-Exp, seen as a state-space system a key head."""

    family = "qwen4_exp"
    stock = STOCK_FAMILIES[family]


register_delta_rule(Qwen4ExpLayer.stock.modeling)
