r"""
Kimi delta attention: Kimi Linear, GLM-5.3 (`glm5_next`) and Ling 3 (`bailing_hybrid`). The key dimension is the state.

A head keeps a matrix of N x d_v numbers, \\( S_t = (I - \beta_t k_t k_t^\top) \mathrm{diag}(a_t) S_{t-1} + \beta_t k_t
v_t^\top \\), and gives \\( S_t^\top q_t \\). As every entry of a key has a decay of its own, no truncation but a choice
of channels leaves the dynamics what they are: write, erase and decay are those of the kept channels, and the readout
takes in the others, \\( T^\top q_t \\). The classes of transformers have one size for keys, queries and values, so only
the mixed form holds fewer keys; the projections stay as they are.

Source of the layer: Kimi Team, 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692).
"""

from __future__ import annotations

from torch import nn

from ...models.compressed.stock_families import STOCK_FAMILIES
from ...systems import Truncation
from ..changes import LayerReduction
from ..registry import register
from ..scans.delta_rule import register_delta_rule
from ..state_layout import StateAxis, StateLayout, runs
from .mixed_only import MixedOnlyLayer


class KimiDeltaLayer(MixedOnlyLayer):
    """A layer of Kimi delta attention, seen as one state-space system a head."""

    required_parts = ("q_proj", "k_proj", "forget_gate", "head_dim", "num_heads")
    cut_projections = {"q_proj": nn.Linear, "k_proj": nn.Linear}
    adaptable_projections = frozenset({"q_proj", "k_proj"})

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Those that keep channels, and none with `stock`."""
        return frozenset() if stock else frozenset({"interpolative", "selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Interpolative truncation."""
        return "interpolative"

    @property
    def stock_layout(self) -> StateLayout:
        """What makes one entry a channel of queries, keys and decays. No cut changes it: it only shows the size."""
        heads = self.module.num_heads
        return StateLayout(
            (
                StateAxis("q_proj.weight", 0, runs("q", heads), others=(self.module.q_proj.in_features,)),
                StateAxis("k_proj.weight", 0, runs("k", heads), others=(self.module.k_proj.in_features,)),
                # No adapter hides this one.
                StateAxis("forget_gate.dt_bias", 0, runs("a", heads)),
            )
        )

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        self._require_kept_states(truncation)
        return super()._reduction(truncation)


@register
class BailingHybridLayer(KimiDeltaLayer):
    """A layer of Ling 3, transformers' `BailingHybridDeltaAttention`; source: `inclusionAI/Ling-3.0-Flash`."""

    family = "bailing_hybrid"
    stock = STOCK_FAMILIES[family]


@register
class Glm5NextLayer(KimiDeltaLayer):
    """A layer of GLM-5.3, transformers' `Glm5NextTextLinearAttention`; source: `zai-org/GLM-5.3-Flash`."""

    family = "glm5_next"
    stock = STOCK_FAMILIES[family]


@register
class KimiLinearLayer(KimiDeltaLayer):
    """
    A layer of Kimi Linear, transformers' `KimiLinearDeltaAttention`; source: `moonshotai/Kimi-Linear-48B-A3B-Instruct`.
    """

    family = "kimi_linear"
    stock = STOCK_FAMILIES[family]


for layer_class in (BailingHybridLayer, Glm5NextLayer, KimiLinearLayer):
    # Version 5.17 of transformers has no Ling.
    if layer_class.stock.is_installed:
        register_delta_rule(layer_class.stock.modeling)
