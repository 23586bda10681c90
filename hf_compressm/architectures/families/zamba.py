r"""
Zamba: transformers' `ZambaMambaMixer`, several Mamba heads side by side with a projection each and no norm.

Every head has channels, `x_proj` and states of its own and runs its own scan, so each has its own Gramians and keeps
its own states; their number is the same. As in Mamba, the readout of a head folds into its rows of the projection.

Source of the layer: Glorioso et al., 2024, "Zamba: A Compact 7B SSM Hybrid Model" (arXiv 2405.16712).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...systems import Truncation, reductor_names
from ..changes import LayerReduction, ParameterChange
from ..contract import ScanObserver
from ..moment_maps.axis import AxisMap
from ..parameters import successor
from ..registry import register
from ..scans.inputs import ScanInputs
from ..scans.selective import register_selective_scan
from .folding import projection_maps, projection_rows, variance_shares
from .selective import SelectiveLayer


@register
class ZambaLayer(SelectiveLayer):
    """A Zamba Mamba mixer, seen as one state-space system a head."""

    family = "zamba"
    mixer_names = frozenset({"ZambaMambaMixer"})
    required_parts = ("A_log", "D", "x_proj_weight")
    config_size_name = "mamba_d_state"

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

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """`A_log` and `x_proj_weight`."""
        return {"A_log": self.module.A_log, "x_proj_weight": self.module.x_proj_weight}

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that `A_log` or `x_proj_weight` in a state dict tells."""
        if prefix + "A_log" in state_dict:
            return state_dict[prefix + "A_log"].shape[2]
        if prefix + "x_proj_weight" in state_dict:
            return (state_dict[prefix + "x_proj_weight"].shape[1] - self.module.time_step_rank) // 2
        return None

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `A_log` and `x_proj_weight` at a state size."""
        head_dim = self.module.mamba_head_dim
        rows = self.module.time_step_rank + 2 * size
        return {"A_log": (self.heads, head_dim, size), "x_proj_weight": (self.heads, rows, head_dim)}

    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass shows the scans of its heads, as parts, to the observer."""
        return super().observed(_HeadByHead(observer, self.heads))

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        """The tensors and sizes for a smaller state, folded and with moments as in Mamba, head by head."""
        rank, size = self.module.time_step_rank, truncation.state_size
        kept = self._require_kept_states(truncation).expand(self.heads, size)
        T = truncation.T.to(device=kept.device, dtype=torch.float64).expand(self.heads, -1, size)
        A_log, projection = self.module.A_log, self.module.x_proj_weight
        weights, moments = (torch.stack(maps) for maps in zip(*(projection_maps(rank, *pair) for pair in zip(kept, T))))
        rows = projection_rows(rank, kept, self.state_size)
        shares = variance_shares(truncation, kept).expand(self.heads, size, -1)
        columns = kept[:, None].expand(-1, A_log.shape[1], -1)
        changes = [
            ParameterChange(A_log, successor(A_log, A_log.gather(2, columns)), AxisMap(2, shares, kept)),
            ParameterChange(
                projection, successor(projection, weights @ projection.double()), AxisMap(1, moments, rows)
            ),
        ]
        return LayerReduction(self, changes, self.size_changes(size), size)


class _HeadByHead:
    """Tells an observer which head a scan is of: a forward pass runs them in order."""

    def __init__(self, observer: ScanObserver, heads: int) -> None:
        self._observer = observer
        self._heads = itertools.cycle(range(heads))

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Hand the scan on, with the head as its part."""
        return self._observer.observe(replace(inputs, part=next(self._heads)), output)


register_selective_scan("transformers.models.zamba.modeling_zamba")
