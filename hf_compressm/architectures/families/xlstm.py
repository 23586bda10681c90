r"""
xLSTM: the mLSTM layers of transformers (`xlstm`) and of the package `xlstm`. The key dimension of a head is its state.

A head keeps \\( S_t = \sigma(f_t) S_{t-1} + e^{i_t} k_t (v_t, 1)^\top \\), whose last column is the normaliser n, and
gives the quotient of what the query reads of the others and of n. The gates are one number a head, so that every
truncation leaves the dynamics what they are, for n as for the rest. Keys and queries are linear in the layer's input:
\\( W_K \leftarrow W^\top W_K \\) and \\( W_Q \leftarrow \sqrt{r / N}\, T^\top W_Q \\), where the factor makes up for
the root of the size that queries are divided by. The result is an xLSTM like any other.

The cache has one size for all layers, and rounds it up to a multiple of 64 over all heads, so the sizes of layers are
equal, and no others than such multiples are cut to.

Source of the layer: Beck et al., 2024, "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), section 2.3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...models.compressed.stock_families import StockFamily
from ...systems import Truncation, reductor_names
from ..changes import LayerReduction, ParameterChange
from ..config_size import ConfigSize
from ..contract import ScanObserver
from ..moment_maps.axis import AxisMap
from ..parameters import successor
from ..registry import register
from ..scans.mlstm import watching_mlstm
from ..state_layout import SizeAttribute, StateAxis, StateLayout, attribute_at, runs
from .selective import SelectiveLayer

# What the cache of transformers rounds the key dimension of all heads up to.
_CACHE_MULTIPLE = 64


@register
class XLSTMLayer(SelectiveLayer):
    """A layer of mLSTM, transformers' `xLSTMLayer`, seen as one state-space system a head; source: `NX-AI/xLSTM-7b`."""

    family = "xlstm"
    # Not in the table of stock families: a compressed class would give layers sizes of their own, which no cache has.
    stock = StockFamily("xLSTMLayer", "xlstm", "xLSTMConfig", "qk_dim_factor", "folded", size_name="qk_dim")
    # That of the package `xlstm`, which transformers takes where it is installed.
    other_mixers = frozenset({"mLSTMLayer"})
    required_parts = ("qk_dim", "mlstm_backend", "multihead_norm", "out_proj")

    @classmethod
    def _can_be_watched(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """All of them: stock weights hold every truncation."""
        return reductor_names(lambda reductor: True)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Balanced truncation."""
        return "balanced"

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """No: the cache has one size."""
        return False

    @classmethod
    def config_size(cls) -> ConfigSize:
        """The share of the width that the keys of all heads have."""
        return ConfigSize(cls.stock.config_size_name, share_of="embedding_dim", heads="num_heads")

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return self.module.config.num_heads

    @property
    def state_size(self) -> int:
        """The present number of states a head."""
        return self.module.qk_dim // self.heads

    @property
    def cache_multiple(self) -> int:
        """Multiples that the cache takes; one where it does not take the present size either."""
        return 1 if self.module.qk_dim % _CACHE_MULTIPLE else math.lcm(self.heads, _CACHE_MULTIPLE) // self.heads

    @property
    def cut_projections(self) -> dict[str, type[nn.Module]]:
        """What makes keys and queries: one module or two, as the config's `weight_mode` has it."""
        return dict.fromkeys(self._rows(), nn.Linear)

    @property
    def layout(self) -> StateLayout:
        """The rows of the projections that make queries and keys, and what counts them."""
        rows = self._rows()
        axes = [
            axis
            for name, entries in rows.items()
            for axis in (
                StateAxis(f"{name}.weight", 0, entries, others=(getattr(self.module, name).in_features,)),
                StateAxis(f"{name}.bias", 0, entries),
            )
            if attribute_at(self.module, axis.parameter) is not None
        ]
        counted = [SizeAttribute(name, "out_features", entries) for name, entries in rows.items()]
        return StateLayout(tuple(axes), (SizeAttribute("", "qk_dim", runs("q", self.heads)), *counted))

    @contextmanager
    def observed(self, observer: ScanObserver) -> Iterator[None]:
        """While the context is open, each forward pass of the layer shows its recurrence to the observer."""
        with _sequences_in_one_piece(self.module.config), watching_mlstm(self.module, observer):
            yield

    def _rows(self) -> dict[str, tuple]:
        """The rows of each projection that makes queries or keys."""
        queries, keys = runs("q", self.heads), runs("k", self.heads)
        if hasattr(self.module, "qkv_opreact"):
            return {"qkv_opreact": (*queries, *keys, 2 * self.module.v_dim)}
        return {"q": queries, "k": keys}

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        r"""
        The layer's tensors and sizes for a smaller state, both matrices folded into the projections.

        Moments: the new state is \\( W^\top S \\) and its adjoint \\( T^\top G \\); the gradient of a query's row is a
        sum over states, that of a key's row a sum over adjoints.
        """
        N, r = truncation.full_size, truncation.state_size
        if r % self.cache_multiple:
            raise UnsupportedModelError(
                f"{self.name} (an xlstm layer) cannot have {r} states: the cache of its model takes multiples of "
                f"{self.cache_multiple} with {self.heads} heads. Set multiple_of={self.cache_multiple}."
            )
        W, T = (matrix.double().expand(self.heads, N, r).mT for matrix in (truncation.W, truncation.T))
        scale = (r / N) ** 0.5
        leading = torch.arange(r, device=W.device)
        changes = []
        for axis, old in zip(self.layout.axes, self.layout.parameters(self.module).values()):
            weights = axis.matrix({"q": scale * T, "k": W})
            moments = AxisMap(axis.axis, axis.matrix({"q": W / scale, "k": T}), axis.kept(leading, N))
            changes.append(ParameterChange(old, successor(old, weights @ old.detach().double()), moments))
        return LayerReduction(self, changes, self.size_changes(r), r)


@contextmanager
def _sequences_in_one_piece(config: Any) -> Iterator[None]:
    """While the context is open, no sequence is too long: transformers runs long ones in pieces, without a gradient."""
    longest = getattr(config, "max_inference_chunksize", None)
    if longest is None:
        yield
        return
    config.max_inference_chunksize = sys.maxsize
    try:
        yield
    finally:
        config.max_inference_chunksize = longest
