r"""
What FalconMamba and Jamba share: Mamba mixers with a norm of B and of C between `x_proj` and the scan.

A norm forbids folding the readout into `x_proj`. A mixed layer combines what the norms give; stock weights hold
selections only: the columns of `A_log`, the rows of `x_proj` and the weights of the norms that belong to the kept
states.

A norm divides by the root mean square over all states. States worth keeping have larger entries than the others, so a
norm over them alone divides by more. The weights of the norms make up for it on average; where they have none, the
skip and the output projection do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ...systems import Truncation
from ..changes import AttributeChange, LayerReduction, ParameterChange
from ..moment_maps.axis import AxisMap, AxisSelection, Rescaling
from ..parameters import successor
from .folding import projection_rows, variance_shares
from .mamba import MambaLayer
from .mixable import MixableLayer
from .selective import rows_of_identity

_NORMS = ("b_layernorm", "c_layernorm")


class NormedMambaLayer(MixableLayer, MambaLayer):
    """A Mamba mixer whose B and C pass a norm."""

    required_parts = (*MambaLayer.required_parts, *_NORMS)
    foreign_parts = ()
    adaptable_projections = frozenset({"x_proj"})

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection, and without `stock` the interpolative cut of a mixed layer."""
        return frozenset({"selection"} if stock else {"interpolative", "selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """The interpolative cut of a mixed layer; selection with `stock`."""
        return "selection" if stock else "interpolative"

    _dynamics = ("A_log",)

    def _stock_parameters(self) -> dict[str, nn.Parameter]:
        """`A_log`, `x_proj.weight`, and the weights of the norms of B and C where they are trained."""
        weights = {f"{name}.weight": getattr(self.module, name).weight for name in _NORMS}
        trained = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
        return {**MambaLayer.state_parameters(self), **trained}

    def rescaled_parameters(self) -> dict[str, nn.Parameter]:
        """`D` and `out_proj.weight` where the norms are not trained and an adapter does not hold the projection."""
        module = self.module
        if any(isinstance(getattr(module, name).weight, nn.Parameter) for name in _NORMS):
            return {}
        if not isinstance(module.out_proj, nn.Linear):
            return {}
        return {"D": module.D, "out_proj.weight": module.out_proj.weight}

    def _stock_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `A_log`, `x_proj` and the norms' weights at a state size."""
        return {**MambaLayer.state_shapes(self, size), **{f"{name}.weight": (size,) for name in _NORMS}}

    def _stock_changes(self, size: int) -> list[AttributeChange]:
        """The sizes of a Mamba mixer, and the constant weights of norms that are not trained."""
        norms = [getattr(self.module, name) for name in _NORMS]
        constants = [
            AttributeChange(norm, "weight", norm.weight.new_ones(size))
            for norm in norms
            if not isinstance(norm.weight, nn.Parameter)
        ]
        return [*MambaLayer.size_changes(self, size), *constants]

    def _saved_projected_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The size that `x_proj`, a norm's weight or `A_log` in a state dict tells."""
        if prefix + "x_proj.weight" in state_dict:
            return (state_dict[prefix + "x_proj.weight"].shape[0] - self.time_step_rank) // 2
        names = (prefix + f"{name}.weight" for name in _NORMS)
        found = next((state_dict[name].shape[0] for name in names if name in state_dict), None)
        return MambaLayer.saved_state_size(self, state_dict, prefix) if found is None else found

    def _beside(self) -> nn.Parameter:
        # Without weight decay, as everything whose name tells of a norm.
        return self.module.dt_proj.bias

    def _changes_of_dynamics(self, truncation: Truncation) -> list[ParameterChange]:
        A_log, kept = self.module.A_log, self._require_kept_states(truncation)
        shares = AxisMap(1, variance_shares(truncation, kept), kept)
        return [ParameterChange(A_log, successor(A_log, A_log.detach()[:, kept]), shares)]

    def _selected(self, kept: Tensor, squares: Tensor | None) -> LayerReduction:
        """The reduction that keeps some of the states."""
        size, rank = len(kept), self.time_step_rank
        A_log, rows = self.module.A_log, projection_rows(rank, kept, self.state_size)
        changes = [ParameterChange(A_log, successor(A_log, A_log[:, kept]), AxisSelection(1, kept, self.state_size))]
        factors = {name: self._lost_scale(name, kept, squares) for name in _NORMS}
        weights = {name: getattr(self.module, name).weight for name in _NORMS}
        for name, old in self._stock_parameters().items():
            if name.startswith("x_proj"):
                changes.append(ParameterChange(old, successor(old, old[rows]), AxisSelection(0, rows, len(old))))
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                changes.append(self._rescaled_norm(weight, kept, factors[name]))
        if not any(isinstance(weight, nn.Parameter) for weight in weights.values()):
            changes += self._rescaled_output(math.prod(factors.values()))
        return LayerReduction(self, changes, self._stock_changes(size), size)

    def _lost_scale(self, norm_name: str, kept: Tensor, squares: Tensor | None) -> float:
        """
        The root mean square of what enters the norm for the kept states, over that for all: what a norm over the kept
        ones alone divides by too much.

        It is measured where `squares` tell what leaves the norm; otherwise that of inputs without correlations.
        """
        index = _NORMS.index(norm_name)
        if squares is None:
            first = self.time_step_rank + index * self.state_size
            entering = self.module.x_proj.weight[first : first + self.state_size].double().square().sum(1)
        else:
            entering = squares[index].to(kept.device) / getattr(self.module, norm_name).weight.double().square()
        # What the norm's weight hides cannot be known: a mean of the others.
        factor = float((entering[kept].nanmean() / entering.nanmean()).sqrt())
        return factor if 0 < factor < math.inf else 1.0

    def _rescaled_norm(self, old: nn.Parameter, kept: Tensor, factor: float) -> ParameterChange:
        """The norm's weights of the kept states, times a factor; their gradient moves with the inverse."""
        picked = rows_of_identity(kept, self.state_size)
        return ParameterChange(old, successor(old, factor * old[kept].double()), AxisMap(0, picked / factor, kept))

    def _rescaled_output(self, factor: float) -> list[ParameterChange]:
        """What is read after the scan, times a factor, and the skip beside the scan, divided by it."""
        scales = {"D": 1 / factor, "out_proj.weight": factor}
        return [
            ParameterChange(old, successor(old, scales[name] * old.double()), Rescaling(1 / scales[name]))
            for name, old in self.rescaled_parameters().items()
        ]
