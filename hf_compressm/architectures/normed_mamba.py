r"""
What FalconMamba and Jamba share: Mamba mixers with a norm of B and of C between `x_proj` and the scan.

A norm forbids folding the readout into `x_proj`, so stock weights hold selections only: the columns of `A_log`, the
rows of `x_proj` and the weights of the norms that belong to the kept states.

A norm divides by the root mean square over all states. States worth keeping have larger entries than the others, so a
norm over them alone divides by more. The weights of the norms make up for it on average; where they have none, the
skip and the output projection do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ..systems import Truncation
from .axis_selection import AxisSelection, Rescaling
from .base import AttributeChange, AxisMap, LayerReduction, ParameterChange, successor
from .mamba import MambaLayer, projection_rows
from .selective import rows_of_identity

_NORMS = ("b_layernorm", "c_layernorm")


class NormedMambaLayer(MambaLayer):
    """A Mamba mixer whose B and C pass a norm."""

    required_parts = (*MambaLayer.required_parts, *_NORMS)
    foreign_parts = ()

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection."""
        return frozenset({"selection"})

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Selection."""
        return "selection"

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """`A_log`, `x_proj.weight`, and the weights of the norms of B and C where they are trained."""
        weights = {f"{name}.weight": getattr(self.module, name).weight for name in _NORMS}
        trained = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
        return {**super().state_parameters(), **trained}

    def rescaled_parameters(self) -> dict[str, nn.Parameter]:
        """`D` and `out_proj.weight` where the norms are not trained and an adapter does not hold the projection."""
        module = self.module
        if any(isinstance(getattr(module, name).weight, nn.Parameter) for name in _NORMS):
            return {}
        if not isinstance(module.out_proj, nn.Linear):
            return {}
        return {"D": module.D, "out_proj.weight": module.out_proj.weight}

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `A_log`, `x_proj` and the norms' weights at a state size."""
        return {**super().state_shapes(size), **{f"{name}.weight": (size,) for name in _NORMS}}

    def size_changes(self, size: int) -> list[AttributeChange]:
        """The sizes of a Mamba mixer, and the constant weights of norms that are not trained."""
        norms = [getattr(self.module, name) for name in _NORMS]
        constants = [
            AttributeChange(norm, "weight", norm.weight.new_ones(size))
            for norm in norms
            if not isinstance(norm.weight, nn.Parameter)
        ]
        return [*super().size_changes(size), *constants]

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that `A_log`, `x_proj` or a norm's weight in a state dict tells."""
        size = super().saved_state_size(state_dict, prefix)
        names = (prefix + f"{name}.weight" for name in _NORMS)
        return next((state_dict[name].shape[0] for name in names if name in state_dict), None) if size is None else size

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        return self._selected(truncation)

    def _selected(self, truncation: Truncation) -> LayerReduction:
        """The reduction that keeps some of the states."""
        kept = self._require_selection(truncation)
        size, rank = len(kept), self.time_step_rank
        A_log, rows = self.module.A_log, projection_rows(rank, kept, self.state_size)
        changes = [ParameterChange(A_log, successor(A_log, A_log[:, kept]), AxisSelection(1, kept, self.state_size))]
        factors = {name: self._lost_scale(name, kept, truncation.squares) for name in _NORMS}
        weights = {name: getattr(self.module, name).weight for name in _NORMS}
        for name, old in self.state_parameters().items():
            if name.startswith("x_proj"):
                changes.append(ParameterChange(old, successor(old, old[rows]), AxisSelection(0, rows, len(old))))
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                changes.append(self._rescaled_norm(weight, kept, factors[name]))
        if not any(isinstance(weight, nn.Parameter) for weight in weights.values()):
            changes += self._rescaled_output(math.prod(factors.values()))
        return LayerReduction(self, changes, self.size_changes(size), size)

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
