r"""
Layers that can mix states: B and C are projected as before, and combined by trained matrices just before the scan.

The scan gets \\( W^\top B_t \\) and \\( T^\top C_t \\) with the W and T of a truncation, \\( W^\top T = I \\). The
projections, and what stands between them and the scan, stay as they are. A later cut makes the same two matrices
smaller. The
classes of such modules are in `models/compressed`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import DimensionError, TruncationError
from ...models.compressed.mixing import mix, mixed_classes, mixing_groups, mixing_sites, stock_classes
from ...systems import Truncation, reductor_names
from ..changes import (
    ABSENT,
    AttributeChange,
    LayerReduction,
    ParameterAddition,
    ParameterChange,
    ParameterRemoval,
    StateForm,
)
from ..measured_truncation import MeasuredTruncation
from ..moment_maps.mixing import MixingMap
from ..parameters import has_hook_of_accelerate, own_parameters, successor
from ..state_layout import StateAxis, StateLayout, runs
from .selective import SelectiveLayer


class MixableLayer(SelectiveLayer):
    """
    A selective layer that a compressed model class can hold with mixed states.

    What is here goes for a layer whose decay is one number for all states of a group, which any truncation leaves as it
    is, and whose stock weights hold selections only. A family of that kind declares its `stock_layout` and no more.
    """

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Selection, and without `stock` what a mixed layer can hold."""
        return reductor_names(lambda reductor: reductor.only_selects or not stock)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Balanced truncation in a mixed layer; selection with `stock`."""
        return "selection" if stock else "balanced"

    @property
    def is_mixed(self) -> bool:
        """Whether the layer mixes states now."""
        sites = self._sites()
        return bool(sites) and all(name in own_parameters(module) for module, name in sites)

    @property
    def state_size(self) -> int:
        """The present number of states of its scan."""
        if not self.is_mixed:
            return self.projected_size
        module, name = self._sites()[0]
        return own_parameters(module)[name].shape[-1]

    @property
    def projected_size(self) -> int:
        """How many entries B and C have where they are projected."""
        return super().state_size

    @property
    @abstractmethod
    def stock_layout(self) -> StateLayout:
        """Where the projected entries lie, and what else has the state size while the layer is not mixed."""

    @property
    def layout(self) -> StateLayout:
        """That of the mixing matrices of a mixed layer, with what else has its state size; else the stock one."""
        return self._mixed_layout(self.projected_size) if self.is_mixed else self.stock_layout

    def fitted_parameters(self) -> dict[str, str]:
        """The mixing matrices of B and of C."""
        return dict(zip(self._site_paths(), ("B", "C")))

    def saved_form(self, state_dict: Mapping[str, Tensor], prefix: str) -> StateForm | None:
        """State size and projected size of this layer in a state dict, or None where it has none."""
        paths = self._site_paths()
        # What a mixed layer keeps of its dynamics has the size of the scan: it shows the projected one only by itself.
        layout = self.stock_layout
        axes = sorted(layout.axes, key=lambda axis: axis.parameter in self._dynamics)
        projected = StateLayout(tuple(axes)).size_in(state_dict, prefix)
        if projected is None or not paths or prefix + paths[0] not in state_dict:
            return None if projected is None else StateForm(projected, projected)
        return StateForm(state_dict[prefix + paths[0]].shape[-1], projected)

    def shapes_of_form(self, form: StateForm) -> dict[str, tuple[int, ...]]:
        """The shapes that a state dict has in a form, by parameter name."""
        size, projected = form
        stock = self.stock_layout.shapes(projected)
        return stock if size == projected else {**stock, **self._mixed_layout(projected).shapes(size)}

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size of a state dict."""
        form = self.saved_form(state_dict, prefix)
        return None if form is None else form.size

    def take_form(self, form: StateForm) -> None:
        """Give the layer another form, in place, before a load; its state parameters hold NaN until then."""
        size, projected = form
        if self.is_mixed and (size == projected or projected != self.projected_size):
            for module, name in self._sites():
                del own_parameters(module)[name]
            for module, cls in stock_classes(self.module):
                module.__class__ = cls
            self.resize(self.projected_size)
        if projected != self.projected_size:
            self.resize(projected)
        if size < projected and not self.is_mixed:
            mix(self.module, size)
        if size != projected:
            self.resize(size)

    def require_form(self, stock: bool, reductor: str) -> None:
        """Raise when an adapter holds a module whose rows would be cut; a mixed layer keeps its projections."""
        if stock or (reductor == "selection" and not self.is_mixed):
            super().require_form(stock, reductor)

    def _is_adapted(self) -> bool:
        """Whether an adapter holds a projection."""
        return any(
            not isinstance(getattr(self.module, name), self.cut_projections[name])
            for name in self.adaptable_projections
        )

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        if self.is_mixed:
            return self._remixed(truncation)
        if truncation.is_selection and not self._is_adapted():
            squares = truncation.squares if isinstance(truncation, MeasuredTruncation) else None
            return self._selected(self._require_selection(truncation), squares)
        return self._mixed(truncation)

    def _mixed(self, truncation: Truncation) -> LayerReduction:
        """The reduction of a stock layer that mixes its states from now on."""
        added = self._additions(self._written(truncation))
        size, changes = truncation.state_size, self._changes_of_dynamics(truncation)
        return LayerReduction(self, changes, self._mixed_classes(), size, self.projected_size, added=added)

    def _remixed(self, truncation: Truncation) -> LayerReduction:
        r"""
        The reduction of a mixed layer: \\( W W_2, T T_2 \\).

        Moments: the adjoint of the new state is \\( T_2^\top g \\) and the state \\( W_2^\top h \\); the gradient of a
        column of W is a sum over adjoints, that of a column of T a sum over states.
        """
        changes = self._changes_of_dynamics(truncation)
        maps = (self._grouped(M).double().mT for M in (truncation.T, truncation.W))
        for (module, name), matrix, columns in zip(self._sites(), self._written(truncation), maps):
            old = own_parameters(module)[name]
            changes.append(ParameterChange(old, successor(old, matrix), MixingMap(columns, old.ndim - 1)))
        return LayerReduction(self, changes, [], truncation.state_size, self.projected_size)

    def mixing_after(self, truncation: Truncation) -> list[Tensor]:
        """
        The matrices that would mix B and C after a truncation, of all entries that are projected now.

        Args:
            truncation ([`~systems.Truncation`]): For the layer's state size.

        Returns:
            `list[torch.Tensor]`: Two of shape `(N, r)`, or `(groups, N, r)` where the family has groups; float64.
        """
        new = [self._grouped(matrix).double() for matrix in (truncation.W, truncation.T)]
        if not self.is_mixed:
            return new
        held = [own_parameters(module)[name].detach().double() for module, name in self._sites()]
        return [old @ matrix.to(old.device) for old, matrix in zip(held, new)]

    def _written(self, truncation: Truncation) -> list[Tensor]:
        """The mixing matrices as they are written."""
        return self.mixing_after(truncation)

    def restoration(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: StateForm
    ) -> LayerReduction:
        """
        What takes the layer back to a form that it had, with tensors from then. Nothing is written.

        Args:
            values (`Mapping[str, torch.Tensor]`): What a cut replaced, by name inside the module.
            states (`Mapping[str, Mapping]`): The optimizer's state of each, by the same names.
            form ([`StateForm`]): State size and projected size.
        """
        if self.is_mixed == form.is_mixed:
            return super().restoration(values, states, form)
        if form.is_mixed:
            return self._mixed_again(values, states, form)
        removed = [ParameterRemoval(module, name) for module, name in self._sites()]
        classes = [AttributeChange(module, "__class__", cls) for module, cls in stock_classes(self.module)]
        layout = self.stock_layout
        kept = {name: p for name, p in layout.parameters(self.module).items() if name in values}
        changes = self._put_back(kept, values, states, layout.shapes(form.projected))
        return LayerReduction(self, changes, classes, *form, removed=removed)

    def _mixed_again(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: StateForm
    ) -> LayerReduction:
        """What gives a stock layer the matrices of a mixed one, as where a checkpoint of an adapter brings its base."""
        if form.projected != self.projected_size:
            raise DimensionError(
                f"the snapshot of {self.name} projects B and C to {form.projected} entries; the layer, to "
                f"{self.projected_size}."
            )
        matrices, dynamics = self._matrices_in(values), self._dynamics_layout()
        changes = self._put_back(dynamics.parameters(self.module), values, states, dynamics.shapes(form.size))
        return LayerReduction(self, changes, self._mixed_classes(), *form, added=self._additions(matrices))

    def _matrices_in(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The mixing matrices in a snapshot."""
        matrices = [values.get(path) for path in self._site_paths()]
        if any(matrix is None for matrix in matrices):
            raise DimensionError(f"the snapshot of {self.name} has no mixing matrices.")
        return matrices

    def _additions(self, matrices: Sequence[Tensor]) -> list[ParameterAddition]:
        """The mixing matrices of B and of C as parameters of a stock layer."""
        beside, added = self._beside(), []
        for (module, name), matrix in zip(self._sites(), matrices):
            values = self._grouped(matrix).to(device=beside.device, dtype=beside.dtype).contiguous().clone()
            new = nn.Parameter(values, requires_grad=beside.requires_grad)
            added.append(ParameterAddition(module, name, new, beside))
        return added

    def _mixed_classes(self) -> list[AttributeChange]:
        changes = []
        for module, cls in mixed_classes(self.module):
            if has_hook_of_accelerate(module):
                raise TruncationError(
                    f"{self.name} runs through a hook of accelerate (device_map over several devices), which would go "
                    "past the mixed states. Load the model on one device, or set stock=True."
                )
            changes.append(AttributeChange(module, "__class__", cls))
            # A forward pass that the package `kernels` has put before that of the class knows no mixing.
            if "forward" in vars(module):
                changes.append(AttributeChange(module, "forward", ABSENT))
        return changes

    def _sites(self) -> list[tuple[nn.Module, str]]:
        return mixing_sites(self.module)

    def _site_paths(self) -> list[str]:
        names = {id(module): name for name, module in self.module.named_modules()}
        return [f"{names[id(module)]}.{name}".lstrip(".") for module, name in self._sites()]

    def _dynamics_layout(self) -> StateLayout:
        by_name = self.stock_layout.by_name
        return StateLayout(tuple(by_name[name] for name in self._dynamics))

    def _mixed_layout(self, projected: int) -> StateLayout:
        groups = mixing_groups(self.module)
        groups = () if groups is None else (groups,)
        matrices = [
            StateAxis(path, len(groups) + 1, runs(), others=(*groups, projected)) for path in self._site_paths()
        ]
        return StateLayout((*self._dynamics_layout().axes, *matrices))

    def _grouped(self, matrix: Tensor) -> Tensor:
        groups = mixing_groups(self.module)
        return matrix if groups is None else matrix.expand(groups, -1, -1)

    # What a family declares.

    _dynamics: ClassVar[tuple[str, ...]] = ()
    """State parameters that have the scan's state size and not the projections'."""

    def _selected(self, kept: Tensor, squares: Tensor | None) -> LayerReduction:
        """
        The reduction that keeps some states.

        Args:
            kept (`torch.Tensor` of shape `(r,)` or `(groups, r)`, int64): The kept states.
            squares (`torch.Tensor`, *optional*): As in a [`MeasuredTruncation`].
        """
        layout, size = self.stock_layout, kept.shape[-1]
        changes = layout.selected(self.module, kept, self.projected_size)
        return LayerReduction(self, changes, layout.size_changes(self.module, size), size)

    def _beside(self) -> nn.Parameter:
        """The parameter that the mixing matrices are trained like: that of the first axis."""
        return next(iter(self.stock_layout.parameters(self.module).values()))

    def _changes_of_dynamics(self, truncation: Truncation) -> list[ParameterChange]:
        """The changes of the parameters in `_dynamics`."""
        return []
