r"""
Mixed layers whose projections can give up rows that the mixing hardly reads.

A mixed layer reads the N entries of B and of C through matrices of N x r. Where the entries are nearly combinations of
M of them, \\( b \approx T b_S \\), the other rows of the projections can go, with all that belongs to them between the
projections and the scan (channels of a convolution, weights of a norm): the matrices become
\\( T^\top W \\), M x r. B and C keep rows of their own. The state, and what the scan does, stay as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import DimensionError
from ...models.compressed.mixing import stock_classes
from ...systems import Truncation
from ..changes import AttributeChange, LayerReduction, ParameterRemoval, StateForm
from ..measured_truncation import rows_of
from ..parameters import own_parameters
from ..projection_rows import ProjectionRows
from ..state_layout import StateLayout
from .mixable import MixableLayer

ShowProjections = Callable[[Tensor, Tensor], None]
"""Gets what a forward pass projects for B and for C, each `(batch, length, N)` or `(batch, length, groups, N)`."""


class NarrowableLayer(MixableLayer):
    """A mixed layer whose projections can become narrower."""

    narrows = True

    @abstractmethod
    def projections_shown(self, show: ShowProjections) -> AbstractContextManager[None]:
        """
        While the context is open, each forward pass of the layer shows what it projects, before it is mixed.

        Args:
            show (`Callable`): Gets what is projected for B and for C.
        """

    @abstractmethod
    def entries_of(self, projected: Tensor, side: int, kept: Tensor | None = None) -> Tensor:
        """
        What the mixing of B or of C reads where only some rows of the projections are there.

        Args:
            projected (`torch.Tensor` of shape `(K, N)` or `(K, groups, N)`): What all rows give.
            side (`int`): 0 for B, 1 for C.
            kept (`torch.Tensor` of shape `(M,)` or `(groups, M)`, int64, *optional*): The rows; all when unset.

        Returns:
            `torch.Tensor` of shape `(K, M)` or `(groups, K, M)`.
        """

    def require_own_projections(self) -> None:
        """
        Raise when the rows of a projection cannot go.

        Raises:
            [`~errors.UnsupportedModelError`]: an adapter holds the module, or a parameter is sharded, quantised or in
                another form that cannot be cut.
        """
        self._require_own_projections(*self.cut_projections)
        self._require_plain(self._projections.parameters(self.module))

    def replaceable_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the state; and those of the projections, where no adapter holds them."""
        known = super().replaceable_parameters()
        if not self.is_mixed or self._is_adapted():
            return known
        return {**self._projections.parameters(self.module), **known}

    @property
    def _projections(self) -> StateLayout:
        """Where the rows of the projections are, with what belongs to them."""
        layout = self.stock_layout
        return replace(layout, axes=tuple(axis for axis in layout.axes if axis.parameter not in self._dynamics))

    def _written(self, truncation: Truncation) -> list[Tensor]:
        matrices, rows = super()._written(truncation), rows_of(truncation)
        return matrices if rows is None else [side.fold(M) for side, M in zip((rows.B, rows.C), matrices)]

    def _mixed(self, truncation: Truncation) -> LayerReduction:
        reduction, rows = super()._mixed(truncation), rows_of(truncation)
        return reduction if rows is None else self._narrowed(reduction, rows)

    def _remixed(self, truncation: Truncation) -> LayerReduction:
        reduction, rows = super()._remixed(truncation), rows_of(truncation)
        if rows is None:
            return reduction
        # Each row of a mixing matrix goes with the row of the projection that it reads.
        sides = zip(self._sites(), (rows.B, rows.C))
        kept = {id(own_parameters(module)[name]): side for (module, name), side in sides}
        parameters = [
            replace(change, moment_map=replace(change.moment_map, rows=side.indices, gain=side.gain))
            if (side := kept.get(id(change.old))) is not None
            else change
            for change in reduction.parameters
        ]
        return self._narrowed(replace(reduction, parameters=parameters), rows)

    def _narrowed(self, reduction: LayerReduction, rows: ProjectionRows) -> LayerReduction:
        """The same reduction with the projections of some rows."""
        if rows.full_count != self.projected_size or reduction.state_size >= rows.count:
            raise DimensionError(
                f"{self.name} projects B and C to {self.projected_size} entries and mixes them to "
                f"{reduction.state_size}; of {rows.full_count} rows {rows.count} cannot stay."
            )
        layout = self._projections
        selected = layout.selected(self.module, rows.by_role, self.projected_size)
        return replace(
            reduction,
            parameters=[*reduction.parameters, *selected],
            attributes=[*layout.size_changes(self.module, rows.count), *reduction.attributes],
            projected_size=rows.count,
        )

    def restoration(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: StateForm
    ) -> LayerReduction:
        """
        What takes the layer back to a form that it had, its projections with it. Nothing is written.

        Args:
            values (`Mapping[str, torch.Tensor]`): What a cut replaced, by name inside the module.
            states (`Mapping[str, Mapping]`): The optimizer's state of each, by the same names.
            form ([`StateForm`]): State size and projected size.
        """
        if form.projected == self.projected_size or not (self.is_mixed or form.is_mixed):
            return super().restoration(values, states, form)
        layout, sites = self.stock_layout, self._sites()
        parameters: dict[str, nn.Parameter] = layout.parameters(self.module)
        attributes = layout.size_changes(self.module, form.projected)
        added, removed = [], []
        if self.is_mixed and form.is_mixed:
            parameters |= {path: own_parameters(m)[name] for path, (m, name) in zip(self._site_paths(), sites)}
        elif form.is_mixed:
            added = self._additions(self._matrices_in(values))
            attributes += self._mixed_classes()
        else:
            removed = [ParameterRemoval(module, name) for module, name in sites]
            attributes += [AttributeChange(module, "__class__", cls) for module, cls in stock_classes(self.module)]
        changes = self._put_back(parameters, values, states, self.shapes_of_form(form))
        return LayerReduction(self, changes, attributes, *form, added=added, removed=removed)
