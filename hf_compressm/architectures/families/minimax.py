r"""
Lightning attention: MiniMax (`minimax`). The key dimension of a head is its state size.

A head keeps a matrix of N x d_v numbers, \\( S_t = \lambda S_{t-1} + k_t v_t^\top \\), and gives \\( S_t^\top q_t \\),
with a fixed decay a head. So every truncation leaves the dynamics what they are: the balanced one of the Gramians of a
head's states. One projection makes queries, keys and values, and an activation follows, so that nothing can be folded;
the mixed form combines keys and queries behind it.

Source of the layer: MiniMax, 2025, "MiniMax-01: Scaling Foundation Models with Lightning Attention" (arXiv 2501.08313).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from ...models.compressed.stock_families import STOCK_FAMILIES
from ..contract import ScanObserver
from ..registry import register
from ..scans.lightning import watching_lightning
from ..state_layout import StateAxis, StateLayout, per_head
from .mixed_only import MixedOnlyLayer


@register
class MiniMaxLayer(MixedOnlyLayer):
    """
    A layer of lightning attention, transformers' `MiniMaxLightningAttention`, seen as one state-space system a head;
    source: `MiniMaxAI/MiniMax-Text-01-hf`.
    """

    family = "minimax"
    stock = STOCK_FAMILIES[family]
    required_parts = ("qkv_proj", "act_fn", "norm", "slope_rate", "num_attention_heads")
    cut_projections = {"qkv_proj": nn.Linear}
    adaptable_projections = frozenset({"qkv_proj"})

    @property
    def stock_layout(self) -> StateLayout:
        """The rows that make queries, keys and values, all of one size. No cut changes them: they only show it."""
        rows = per_head(self.module.num_attention_heads, "q", "k", "v")
        return StateLayout((StateAxis("qkv_proj.weight", 0, rows, others=(self.module.qkv_proj.in_features,)),))

    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass of the layer shows its attention to the observer."""
        return watching_lightning(self.module, observer)

    @classmethod
    def _can_be_watched(cls, module: nn.Module) -> bool:
        return True
