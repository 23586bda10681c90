r"""
Layers that can mix states: B and C are projected as before, and combined by trained matrices just before the scan.

The scan gets \\( W^\top B_t \\) and \\( T^\top C_t \\) with the W and T of a truncation, \\( W^\top T = I \\). The
projections, and what stands between them and the scan, stay as they are. A later cut multiplies the matrices. The
classes of such modules are in `models/compressed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import DimensionError, TruncationError
from ...systems import Truncation
from ..changes import ABSENT, AttributeChange, LayerReduction, ParameterAddition, ParameterChange, ParameterRemoval
from ..contract import successor
from ..moment_maps.mixing import MixingMap
from .selective import STATE_SIZE_NAMES, SelectiveLayer, named_size


class MixableLayer(SelectiveLayer):
    """A selective layer that a compressed model class can hold with mixed states."""

    @property
    def is_mixed(self) -> bool:
        """Whether the layer mixes states now."""
        sites = self._sites()
        return bool(sites) and all(name in module._parameters for module, name in sites)

    @property
    def state_size(self) -> int:
        """The present number of states of its scan."""
        if not self.is_mixed:
            return self.projected_size
        module, name = self._sites()[0]
        return module._parameters[name].shape[-1]

    @property
    def projected_size(self) -> int:
        """How many entries B and C have where they are projected."""
        return getattr(self.module, named_size(self.module, STATE_SIZE_NAMES))

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """The mixing matrices of a mixed layer, with what else has its state size; else what the projections have."""
        return self._mixed_parameters() if self.is_mixed else self._stock_parameters()

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the state parameters at a state size."""
        return self._mixed_shapes(size, self.projected_size) if self.is_mixed else self._stock_shapes(size)

    def size_changes(self, size: int) -> list[AttributeChange]:
        """What tells the state size; in a mixed layer the shapes of its matrices alone do."""
        return [] if self.is_mixed else self._stock_changes(size)

    def saved_form(self, state_dict: Mapping[str, Tensor], prefix: str) -> tuple[int, int] | None:
        """State size and projected size of this layer in a state dict, or None where it does not tell."""
        paths = self._site_paths()
        projected = self._saved_projected_size(state_dict, prefix)
        if projected is None or not paths or prefix + paths[0] not in state_dict:
            return None if projected is None else (projected, projected)
        return state_dict[prefix + paths[0]].shape[-1], projected

    def shapes_of_form(self, form: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shapes that a state dict has in a form, by parameter name."""
        size, projected = form
        stock = self._stock_shapes(projected)
        return stock if size == projected else {**stock, **self._mixed_shapes(size, projected)}

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """The state size that a state dict tells."""
        form = self.saved_form(state_dict, prefix)
        return None if form is None else form[0]

    def take_form(self, form: tuple[int, int]) -> None:
        """Give the layer another form, in place, before a load; its state parameters hold NaN until then."""
        from ...models.compressed.mixing import mix, stock_classes

        size, projected = form
        if self.is_mixed and (size == projected or projected != self.projected_size):
            for module, name in self._sites():
                del module._parameters[name]
            for module, cls in stock_classes(self.module):
                module.__class__ = cls
            self.resize(self.projected_size)
        if projected != self.projected_size:
            self.resize(projected)
        if size < projected and not self.is_mixed:
            mix(self.module, size)
        if size != projected:
            self.resize(size)

    def check_form(self, stock: bool, reductor: str) -> None:
        """Raise when an adapter holds a module whose rows would be cut; a mixed layer keeps its projections."""
        if stock or (reductor == "selection" and not self.is_mixed):
            super().check_form(stock, reductor)

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
            return self._selected(self._require_selection(truncation), truncation.squares)
        return self._mixed(truncation)

    def _mixed(self, truncation: Truncation) -> LayerReduction:
        """The reduction of a stock layer that mixes its states from now on."""
        added = self._additions((truncation.W, truncation.T))
        size, changes = truncation.state_size, self._changes_of_dynamics(truncation)
        return LayerReduction(self, changes, self._mixed_classes(), size, self.projected_size, added=added)

    def _remixed(self, truncation: Truncation) -> LayerReduction:
        r"""
        The reduction of a mixed layer: \\( W W_2, T T_2 \\).

        Moments: the adjoint of the new state is \\( T_2^\top g \\) and the state \\( W_2^\top h \\); the gradient of a
        column of W is a sum over adjoints, that of a column of T a sum over states.
        """
        changes = self._changes_of_dynamics(truncation)
        pairs = ((truncation.W, truncation.T), (truncation.T, truncation.W))
        for (module, name), (matrix, other) in zip(self._sites(), pairs):
            old = module._parameters[name]
            matrix, other = (self._grouped(M).to(device=old.device, dtype=torch.float64) for M in (matrix, other))
            values = successor(old, old.detach().double() @ matrix)
            changes.append(ParameterChange(old, values, MixingMap(other.mT, old.ndim - 1)))
        return LayerReduction(self, changes, [], truncation.state_size, self.projected_size)

    def restoration(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: tuple[int, int]
    ) -> LayerReduction:
        """
        What takes the layer back to a form that it had, with tensors from then. Nothing is written.

        Args:
            values (`Mapping[str, torch.Tensor]`): What a cut replaced, by name inside the module.
            states (`Mapping[str, Mapping]`): The optimizer's state of each, by the same names.
            form (`tuple[int, int]`): State size and projected size.
        """
        mixed = form[0] < form[1]
        if self.is_mixed == mixed:
            return super().restoration(values, states, form)
        if mixed:
            return self._mixed_again(values, states, form)
        from ...models.compressed.mixing import stock_classes

        removed = [ParameterRemoval(module, name) for module, name in self._sites()]
        classes = [AttributeChange(module, "__class__", cls) for module, cls in stock_classes(self.module)]
        kept = {name: p for name, p in self._stock_parameters().items() if name in values}
        changes = self._put_back(kept, values, states, self._stock_shapes(form[1]))
        return LayerReduction(self, changes, classes, form[0], form[1], removed=removed)

    def _mixed_again(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: tuple[int, int]
    ) -> LayerReduction:
        """What gives a stock layer the matrices of a mixed one, as where a checkpoint of an adapter brings its base."""
        if form[1] != self.projected_size:
            raise DimensionError(
                f"the snapshot of {self.name} projects B and C to {form[1]} entries; the layer, to "
                f"{self.projected_size}."
            )
        matrices = [values.get(path) for path in self._site_paths()]
        if any(matrix is None for matrix in matrices):
            raise DimensionError(f"the snapshot of {self.name} has no mixing matrices.")
        kept = {name: p for name, p in self._stock_parameters().items() if name in self._dynamics}
        changes = self._put_back(kept, values, states, self._stock_shapes(form[0]))
        return LayerReduction(self, changes, self._mixed_classes(), *form, added=self._additions(matrices))

    def _additions(self, matrices: Sequence[Tensor]) -> list[ParameterAddition]:
        """The mixing matrices of B and of C as parameters of a stock layer."""
        beside, added = self._beside(), []
        for (module, name), matrix in zip(self._sites(), matrices):
            values = self._grouped(matrix).to(device=beside.device, dtype=beside.dtype).contiguous().clone()
            new = nn.Parameter(values, requires_grad=beside.requires_grad)
            added.append(ParameterAddition(module, name, new, beside))
        return added

    def _mixed_classes(self) -> list[AttributeChange]:
        from ...models.compressed.mixing import mixed_classes

        changes = []
        for module, cls in mixed_classes(self.module):
            if hasattr(module, "_hf_hook"):
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
        from ...models.compressed.mixing import mixing_sites

        return mixing_sites(self.module)

    def _site_paths(self) -> list[str]:
        names = {id(module): name for name, module in self.module.named_modules()}
        return [f"{names[id(module)]}.{name}".lstrip(".") for module, name in self._sites()]

    def _mixed_parameters(self) -> dict[str, nn.Parameter]:
        dynamics = {name: p for name, p in self._stock_parameters().items() if name in self._dynamics}
        sites = zip(self._site_paths(), self._sites())
        return {**dynamics, **{path: module._parameters[name] for path, (module, name) in sites}}

    def _mixed_shapes(self, size: int, projected: int) -> dict[str, tuple[int, ...]]:
        stock = self._stock_shapes(size)
        shapes = {name: stock[name] for name in self._dynamics}
        groups = () if self.mixing_groups is None else (self.mixing_groups,)
        return {**shapes, **dict.fromkeys(self._site_paths(), (*groups, projected, size))}

    def _grouped(self, matrix: Tensor) -> Tensor:
        return matrix if self.mixing_groups is None else matrix.expand(self.mixing_groups, -1, -1)

    # What a family tells of itself.

    _dynamics: ClassVar[tuple[str, ...]] = ()
    """State parameters that have the scan's state size and not the projections'."""

    @property
    def mixing_groups(self) -> int | None:
        """How many pairs of mixing matrices the layer has; None where they have no axis for it."""
        return None

    def _stock_parameters(self) -> dict[str, nn.Parameter]:
        raise NotImplementedError

    def _stock_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _stock_changes(self, size: int) -> list[AttributeChange]:
        raise NotImplementedError

    def _saved_projected_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        raise NotImplementedError

    def _selected(self, kept: Tensor, squares: Tensor | None) -> LayerReduction:
        """The reduction that keeps some states; `squares` as in a truncation."""
        raise NotImplementedError

    def _beside(self) -> nn.Parameter:
        """The parameter that the mixing matrices are trained like."""
        raise NotImplementedError

    def _changes_of_dynamics(self, truncation: Truncation) -> list[ParameterChange]:
        """The changes of the parameters in `_dynamics`."""
        return []
