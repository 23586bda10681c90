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

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ...systems import Truncation, reductor_names
from ..changes import LayerReduction, ParameterChange
from ..moment_maps.axis import AxisMap, Rescaling
from ..parameters import successor
from ..state_layout import SizeAttribute, StateAxis, StateLayout, rows_of_identity, runs
from .folding import sliced_dynamics
from .mamba import MambaLayer
from .narrowable import NarrowableLayer, ShowProjections

_NORMS = ("b_layernorm", "c_layernorm")
_ROLES = {"b_layernorm": "B", "c_layernorm": "C"}


class NormedMambaLayer(NarrowableLayer, MambaLayer):
    """A Mamba mixer whose B and C pass a norm."""

    required_parts = (*MambaLayer.required_parts, *_NORMS)
    other_mixers = frozenset()
    foreign_parts = ()
    adaptable_projections = frozenset({"x_proj"})

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection, and without `stock` the interpolative cut of a mixed layer."""
        return reductor_names(lambda reductor: reductor.only_selects if stock else reductor.keeps_states)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """The interpolative cut of a mixed layer; selection with `stock`."""
        return "selection" if stock else "interpolative"

    _dynamics = ("A_log",)

    @property
    def stock_layout(self) -> StateLayout:
        """That of a Mamba mixer, with the weights of the norms of B and C, which are constants where not trained."""
        layout = MambaLayer.layout.fget(self)
        trained = [name for name in _NORMS if isinstance(getattr(self.module, name).weight, nn.Parameter)]
        weights = [StateAxis(f"{name}.weight", 0, runs(_ROLES[name])) for name in trained]
        constants = [SizeAttribute(name, "weight", runs()) for name in _NORMS if name not in trained]
        return StateLayout((*layout.axes, *weights), (*layout.attributes, *constants))

    def rescaled_parameters(self) -> dict[str, nn.Parameter]:
        """`D` and `out_proj.weight` where the norms are not trained and an adapter does not hold the projection."""
        module = self.module
        if any(isinstance(getattr(module, name).weight, nn.Parameter) for name in _NORMS):
            return {}
        if not isinstance(module.out_proj, nn.Linear):
            return {}
        return {"D": module.D, "out_proj.weight": module.out_proj.weight}

    @contextmanager
    def projections_shown(self, show: ShowProjections) -> Iterator[None]:
        """
        While the context is open, each forward pass shows what `x_proj` gives to the norms of B and C.

        Args:
            show (`Callable`): Gets both, `(batch, length, N)`.
        """
        found = []

        def enters(module: nn.Module, inputs: tuple) -> None:
            # The norm of B runs first.
            found.append(inputs[0])
            if len(found) == 2:
                show(*found)
                found.clear()

        with ExitStack() as stack:
            for name in _NORMS:
                stack.callback(getattr(self.module, name).register_forward_pre_hook(enters).remove)
            yield

    def entries_of(self, projected: Tensor, side: int, kept: Tensor | None = None) -> Tensor:
        """
        What the norm of the kept rows alone makes of them, `(K, M)`.

        Args:
            projected (`torch.Tensor` of shape `(K, N)`): What all rows give.
            side (`int`): 0 for B, 1 for C.
            kept (`torch.Tensor` of shape `(M)`, int64, *optional*): The rows; all when unset.
        """
        norm = copy.deepcopy(getattr(self.module, _NORMS[side]))
        norm.__class__ = getattr(type(norm), "stock_class", type(norm))
        projected = projected.to(norm.weight.device)
        if kept is not None:
            kept = kept.to(projected.device)
            norm.weight.data, projected = norm.weight.data[kept], projected[:, kept]
        return norm(projected)

    def _beside(self) -> nn.Parameter:
        # Without weight decay, as everything whose name is that of a norm.
        return self.module.dt_proj.bias

    def _changes_of_dynamics(self, truncation: Truncation) -> list[ParameterChange]:
        kept, axis = self._require_kept_states(truncation), self.stock_layout.by_name["A_log"]
        return [sliced_dynamics(axis, self.module.A_log, truncation, kept)]

    def _selected(self, kept: Tensor, squares: Tensor | None) -> LayerReduction:
        """The reduction that keeps some of the states."""
        layout, size = self.stock_layout, len(kept)
        changes = layout.selected(self.module, kept, self.state_size)
        factors = {f"{name}.weight": self._lost_scale(name, kept, squares) for name in _NORMS}
        for number, axis in enumerate(layout.axes):
            if axis.parameter in factors:
                changes[number] = self._rescaled_norm(changes[number].old, kept, factors[axis.parameter])
        if not factors.keys() & layout.by_name.keys():
            changes += self._rescaled_output(math.prod(factors.values()))
        return LayerReduction(self, changes, layout.size_changes(self.module, size), size)

    def _lost_scale(self, norm_name: str, kept: Tensor, squares: Tensor | None) -> float:
        """
        The root mean square of what enters the norm for the kept states, over that for all: what a norm over the kept
        ones alone divides by too much.

        It is measured where `squares` show what leaves the norm; otherwise that of inputs without correlations.
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
