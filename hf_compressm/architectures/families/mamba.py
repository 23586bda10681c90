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

from torch import nn

from ...models.compressed.stock_families import STOCK_FAMILIES
from ...systems import Truncation, reductor_names
from ..changes import LayerReduction
from ..registry import register
from ..scans.mixer import register_mixer
from ..scans.selective import register_selective_scan
from ..state_layout import SizeAttribute, StateAxis, StateLayout, runs
from .folding import folded
from .selective import SelectiveLayer, named_size

# The two libraries' names for the same size.
_TIME_STEP_RANK_NAMES = ("time_step_rank", "dt_rank")


@register
class MambaLayer(SelectiveLayer):
    """A Mamba mixer of transformers or of mamba-ssm, seen as a state-space system."""

    family = "mamba"
    stock = STOCK_FAMILIES[family]
    required_parts = ("A_log", "D", "in_proj", "conv1d", "x_proj", "dt_proj")
    other_mixers = None
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

    @property
    def layout(self) -> StateLayout:
        """The columns of `A_log` and the rows of `x_proj`: those of the time step, of B and of C."""
        rows = (self.time_step_rank, *runs("B"), *runs("C"))
        axes = [
            StateAxis("A_log", 1, runs("A"), others=(self.module.D.shape[0],)),
            StateAxis("x_proj.weight", 0, rows, others=(self.module.x_proj.in_features,)),
        ]
        if getattr(self.module.x_proj, "bias", None) is not None:
            axes.append(StateAxis("x_proj.bias", 0, rows))
        return StateLayout(tuple(axes), (self.size_attribute, SizeAttribute("x_proj", "out_features", rows)))

    def fitted_parameters(self) -> dict[str, str]:
        """The projection that the readout is folded into, whose input is that of the scan."""
        return {"x_proj.weight": "u"}

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        r"""
        The layer's tensors and sizes for a smaller state, the readout folded into `x_proj`.

        Moments: the adjoint of the kept states is \\( T^\top g \\), so the gradient of \\( W_B \\) moves with
        \\( T^\top \\); the rows of \\( W_C \\) see the same state as before and are sliced. The gradient of a column of
        `A_log` is a sum of products of a state and its adjoint; a kept state takes over its share of it
        of each dropped state's variance. That is exact where the dropped states are multiples of kept ones.
        """
        kept = self._require_kept_states(truncation)
        changes = folded(self.layout, self.module, truncation, kept)
        return LayerReduction(self, changes, self.size_changes(truncation.state_size), truncation.state_size)


register_selective_scan(MambaLayer.stock.modeling)
register_mixer(MambaLayer.stock.modeling, MambaLayer.stock.mixer)
