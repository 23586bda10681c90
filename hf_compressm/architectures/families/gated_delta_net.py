r"""
What the layers with gated DeltaNet share: the key dimension of a head is its state size.

A head keeps a matrix of d_k x d_v numbers, \\( S_t = e^{g_t} (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top
\\), and gives \\( S_t^\top q_t \\). Consecutive value heads share the k and q of a key head; their Gramians are summed,
and each key head is cut for itself. Between the projections and the rule stand a convolution, an activation and the
norm of k and q, so stock weights hold selections of key channels only. A selection changes the norm: what it takes from
q cancels in the norm of the head's output, what it takes from k does not. A mixed layer combines what the norm gives,
with matrices that are orthonormal at the cut.

Source of the layer: Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv
2412.06464).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...errors import TruncationError
from ...systems import Truncation
from ..changes import LayerReduction
from ..contract import ScanObserver
from ..scans.delta_rule import DeltaRuleInputs
from ..state_layout import Entries, SizeAttribute, StateAxis, StateLayout, per_head, runs
from .mixable import MixableLayer

# Attributes of the convolution that hold its number of channels.
_CHANNEL_COUNTS = ("in_channels", "out_channels", "groups")
# How far from orthonormal the columns of W may be.
_DEVIATION = 1e-6


class GatedDeltaNetLayer(MixableLayer):
    """A layer of gated DeltaNet, seen as one state-space system a key head."""

    required_parts = ("A_log", "dt_bias", "conv1d", "head_k_dim", "num_k_heads")

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection, and without `stock` those with an orthonormal W."""
        return frozenset({"selection"} if stock else {"orthonormal", "interpolative", "selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Orthonormal truncation in a mixed layer; selection with `stock`."""
        return "selection" if stock else "orthonormal"

    @property
    def key_heads(self) -> int:
        """How many key heads there are, each with its own k and q."""
        return self.module.num_k_heads

    @property
    def stock_layout(self) -> StateLayout:
        """The rows of the projections and the channels of the convolution that make k and q."""
        module = self.module
        q_and_k = (*runs("q", self.key_heads), *runs("k", self.key_heads))
        channels = (*q_and_k, module.value_dim)
        rows = self._projected_rows(q_and_k)
        axes = [
            StateAxis(f"{name}.weight", 0, entries, others=(getattr(module, name).in_features,))
            for name, entries in rows.items()
        ]
        axes.append(StateAxis("conv1d.weight", 0, channels, others=tuple(module.conv1d.weight.shape[1:])))
        counted = [
            ("", "key_dim", runs("k", self.key_heads)),
            ("", "conv_dim", channels),
            *((name, "out_features", entries) for name, entries in rows.items()),
            *(("conv1d", name, channels) for name in _CHANNEL_COUNTS),
        ]
        return StateLayout(tuple(axes), (self.size_attribute, *(SizeAttribute(*each) for each in counted)))

    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass shows its rule to the observer, one k and q a key head."""
        return super().observed(_ByKeyHead(observer, self.key_heads))

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        W = truncation.W.double()
        deviation = float((W.mT @ W - torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)).abs().max())
        if deviation > _DEVIATION:
            raise TruncationError(
                f"W of the truncation is not orthonormal (W^T W differs from the identity by {deviation:.2g}), so keys "
                f"of {self.name} (a {self.family} layer) could become longer than one and its state could grow; use "
                f"one of the reductors {', '.join(sorted(self.reductors(False)))}."
            )
        return super()._reduction(truncation)

    # What a family declares.

    def _projected_rows(self, q_and_k: Entries) -> dict[str, Entries]:
        """The rows of each projection that makes q or k, by the projection's name: here those of the convolution."""
        return {"in_proj_qkv": (*q_and_k, self.module.value_dim)}


class InterleavedLayer(GatedDeltaNetLayer):
    """A layer whose one projection makes q, k, v and z of the first key head, then those of the second, and so on."""

    cut_projections = {"in_proj_qkvz": nn.Linear, "conv1d": nn.Conv1d}
    adaptable_projections = frozenset({"in_proj_qkvz"})

    def _projected_rows(self, q_and_k: Entries) -> dict[str, Entries]:
        width = 2 * self.module.value_dim // self.key_heads
        return {"in_proj_qkvz": per_head(self.key_heads, "q", "k", width)}


class JointLayer(GatedDeltaNetLayer):
    """A layer whose one projection makes all of q, then all of k and of v."""

    cut_projections = {"in_proj_qkv": nn.Linear, "conv1d": nn.Conv1d}
    adaptable_projections = frozenset({"in_proj_qkv"})


class SeparateLayer(GatedDeltaNetLayer):
    """A layer with a projection for q and one for k."""

    cut_projections = {"q_proj": nn.Linear, "k_proj": nn.Linear, "conv1d": nn.Conv1d}
    adaptable_projections = frozenset({"q_proj", "k_proj"})

    def _projected_rows(self, q_and_k: Entries) -> dict[str, Entries]:
        return {"q_proj": runs("q", self.key_heads), "k_proj": runs("k", self.key_heads)}


class _ByKeyHead:
    """Shows an observer one k and q a key head, whatever the version of transformers hands to the rule."""

    def __init__(self, observer: ScanObserver, key_heads: int) -> None:
        self._observer = observer
        self._key_heads = key_heads

    def observe(self, inputs: DeltaRuleInputs, output: Tensor) -> Tensor:
        """Hand the rule on."""
        return self._observer.observe(inputs.shared_by(self._key_heads), output)
