r"""
Zamba: transformers' `ZambaMambaMixer`, several Mamba heads side by side with a projection each and no norm.

Every head has channels, `x_proj` and states of its own and runs its own scan, so each has its own Gramians and keeps
its own states; their number is the same. As in Mamba, the readout of a head folds into its rows of the projection.

Source of the layer: Glorioso et al., 2024, "Zamba: A Compact 7B SSM Hybrid Model" (arXiv 2405.16712).
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from ...models.compressed.stock_families import STOCK_FAMILIES
from ...systems import Truncation, reductor_names
from ..changes import LayerReduction
from ..contract import ScanObserver
from ..registry import register
from ..scans.inputs import ScanInputs
from ..scans.mixer import register_mixer
from ..scans.mixer_forms import HeadsForm
from ..scans.selective import register_selective_scan
from ..state_layout import StateAxis, StateLayout, runs
from .folding import folded
from .selective import SelectiveLayer


@register
class ZambaLayer(SelectiveLayer):
    """A Zamba Mamba mixer, seen as one state-space system a head."""

    family = "zamba"
    stock = STOCK_FAMILIES[family]
    required_parts = ("A_log", "D", "x_proj_weight")

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Interpolative, folded into the weights head by head, and selection."""
        return reductor_names(lambda reductor: reductor.keeps_states)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Interpolative."""
        return "interpolative"

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.module.n_mamba_heads

    @property
    def layout(self) -> StateLayout:
        """The last axis of `A_log` and the rows of `x_proj_weight`, in each head."""
        head_dim = self.module.mamba_head_dim
        rows = (self.module.time_step_rank, *runs("B"), *runs("C"))
        axes = (
            StateAxis("A_log", 2, runs("A"), others=(self.heads, head_dim), batched=True),
            StateAxis("x_proj_weight", 1, rows, others=(self.heads, head_dim), batched=True),
        )
        return StateLayout(axes, (self.size_attribute,))

    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass shows the scans of its heads, as parts, to the observer."""
        return super().observed(_HeadByHead(observer, self.heads))

    def fitted_parameters(self) -> dict[str, str]:
        """The projection that the readout is folded into, whose input is that of the scan."""
        return {"x_proj_weight": "u"}

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        """The tensors and sizes for a smaller state, folded and with moments as in Mamba, head by head."""
        size = truncation.state_size
        kept = self._require_kept_states(truncation).expand(self.heads, size)
        changes = folded(self.layout, self.module, truncation, kept)
        return LayerReduction(self, changes, self.size_changes(size), size)


class _HeadByHead:
    """Lets an observer know which head a scan is of: a forward pass runs them in order."""

    def __init__(self, observer: ScanObserver, heads: int) -> None:
        self._observer = observer
        self._heads = itertools.cycle(range(heads))

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Hand the scan on, with the head as its part."""
        return self._observer.observe(replace(inputs, part=next(self._heads)), output)


register_selective_scan(ZambaLayer.stock.modeling)
register_mixer(ZambaLayer.stock.modeling, ZambaLayer.stock.mixer, HeadsForm)
