r"""
Mamba: transformers' `MambaMixer` and mamba-ssm's `Mamba`, two modules of one shape.

Both hold `A_log` (channels x N) and one linear projection `x_proj` whose rows are, in order, the time step's low-rank
part, \\( W_B \\) (N) and \\( W_C \\) (N). \\( C_t = W_C x_t \\) is linear in the layer's input, so the interpolative
cut \\( h \approx T h_S \\) folds into the weights: \\( A \leftarrow A_{:,S} \\), \\( W_B \leftarrow (W_B)_S \\),
\\( W_C \leftarrow T^\top W_C \\). The result is a Mamba layer like any other.

Source of the layer: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...systems import Truncation, reductor_names
from ..changes import AttributeChange, LayerReduction, ParameterChange
from ..moment_maps.axis import AxisMap
from ..parameters import successor
from ..registry import register
from ..scans.selective import register_selective_scan
from .folding import projection_maps, projection_rows, variance_shares
from .selective import SelectiveLayer, named_size

# The two libraries' names for the same size.
_TIME_STEP_RANK_NAMES = ("time_step_rank", "dt_rank")


@register
class MambaLayer(SelectiveLayer):
    """A Mamba mixer of transformers or of mamba-ssm, seen as a state-space system."""

    family = "mamba"
    required_parts = ("A_log", "D", "in_proj", "conv1d", "x_proj", "dt_proj")
    # A norm between x_proj and the scan forbids folding the readout into x_proj; Zamba has a projection a head.
    foreign_parts = ("b_layernorm", "c_layernorm", "rms_eps", "x_proj_weight")
    cut_projections = {"x_proj": nn.Linear}

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Interpolative, folded into the weights, and selection."""
        return reductor_names(lambda reductor: reductor.keeps_states)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Interpolative."""
        return "interpolative"

    @property
    def time_step_rank(self) -> int:
        """The number of rows of `x_proj` that make the time step."""
        return getattr(self.module, named_size(self.module, _TIME_STEP_RANK_NAMES))

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """`A_log` and `x_proj.weight` (and `x_proj.bias` where a module has one)."""
        parameters = {"A_log": self.module.A_log, "x_proj.weight": getattr(self.module.x_proj, "weight", None)}
        if getattr(self.module.x_proj, "bias", None) is not None:
            parameters["x_proj.bias"] = self.module.x_proj.bias
        return parameters

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that the rows of `x_proj` or the columns of `A_log` in a state dict tell."""
        if prefix + "A_log" in state_dict:
            return state_dict[prefix + "A_log"].shape[1]
        if prefix + "x_proj.weight" in state_dict:
            return (state_dict[prefix + "x_proj.weight"].shape[0] - self.time_step_rank) // 2
        return None

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `A_log` and `x_proj` at a state size."""
        rows = self.time_step_rank + 2 * size
        return {
            "A_log": (self.module.D.shape[0], size),
            "x_proj.weight": (rows, self.module.x_proj.in_features),
            "x_proj.bias": (rows,),
        }

    def size_changes(self, size: int) -> list[AttributeChange]:
        """The mixer's state size and the rows of `x_proj`."""
        rows = AttributeChange(self.module.x_proj, "out_features", self.time_step_rank + 2 * size)
        return [*super().size_changes(size), rows]

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        r"""
        The layer's tensors and sizes for a smaller state, the readout folded into `x_proj`.

        Moments: the adjoint of the kept states is \\( T^\top g \\), so the gradient of \\( W_B \\) moves with
        \\( T^\top \\); the rows of \\( W_C \\) see the same state as before and are sliced. The gradient of a column of
        `A_log` is a sum of products of a state and its adjoint; a kept state takes over the share of it that it carries
        of each dropped state's variance. That is exact where the dropped states are multiples of kept ones.
        """
        kept = self._require_kept_states(truncation)
        T, size = truncation.T.to(device=kept.device, dtype=torch.float64), truncation.state_size
        weights, moments = projection_maps(self.time_step_rank, kept, T)
        rows = projection_rows(self.time_step_rank, kept, self.state_size)

        parameters = [
            ParameterChange(
                self.module.A_log,
                successor(self.module.A_log, self.module.A_log.detach()[:, kept]),
                AxisMap(1, variance_shares(truncation, kept), kept),
            )
        ]
        for name, old in self.state_parameters().items():
            if name != "A_log":
                values = weights @ old.detach().double()
                parameters.append(ParameterChange(old, successor(old, values), AxisMap(0, moments, rows)))
        return LayerReduction(self, parameters, self.size_changes(size), size)


register_selective_scan("transformers.models.mamba.modeling_mamba")
