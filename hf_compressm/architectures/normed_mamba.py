r"""
What FalconMamba and Jamba share: Mamba mixers with a norm of B and of C between `x_proj` and the scan.

A norm forbids folding the readout into `x_proj`. A mixed layer combines what the norms give; stock weights hold
selections only: the columns of `A_log`, the rows of `x_proj` and the weights of the norms that belong to the kept
states. There, the norm divides by the root mean square
over all states, which a cut changes; where the norms have weights, these make up for what it changes on average.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..systems import Truncation
from .axis_map import AxisMap
from .axis_selection import AxisSelection
from .base import AttributeChange, LayerReduction, ParameterChange, successor
from .mamba import MambaLayer, projection_rows, variance_shares
from .mixable import MixableLayer

_NORMS = ("b_layernorm", "c_layernorm")


class NormedMambaLayer(MixableLayer, MambaLayer):
    """A Mamba mixer whose B and C pass a norm."""

    required_parts = (*MambaLayer.required_parts, *_NORMS)
    foreign_parts = ()

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

    def _selected(self, kept: Tensor) -> LayerReduction:
        """The reduction that keeps some of the states."""
        size, rank = len(kept), self.time_step_rank
        A_log, rows = self.module.A_log, projection_rows(rank, kept, self.state_size)
        changes = [ParameterChange(A_log, successor(A_log, A_log[:, kept]), AxisSelection(1, kept, self.state_size))]
        for name, old in self._stock_parameters().items():
            if name.startswith("x_proj"):
                changes.append(ParameterChange(old, successor(old, old[rows]), AxisSelection(0, rows, len(old))))
            elif name != "A_log":
                changes.append(self._selected_norm(old, name, kept))
        return LayerReduction(self, changes, self._stock_changes(size), size)

    def _selected_norm(self, old: nn.Parameter, name: str, kept: Tensor) -> ParameterChange:
        r"""
        The norm's weights of the kept states, times the root mean square of their projections over that of all.

        For inputs without correlations the mean square of a projection is the square of its row's length. The gradient
        of the weights moves with the inverse.
        """
        first = self.time_step_rank + (0 if name.startswith("b_") else self.state_size)
        squares = self.module.x_proj.weight[first : first + self.state_size].double().square().sum(1)
        factor = (squares[kept].mean() / squares.mean()).sqrt()
        factor = factor if factor > 0 and torch.isfinite(factor) else torch.ones_like(factor)
        picked = torch.eye(self.state_size, dtype=torch.float64, device=kept.device)[kept]
        return ParameterChange(old, successor(old, factor * old[kept].double()), AxisMap(0, picked / factor, kept))
