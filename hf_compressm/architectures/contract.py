"""The contract between a model family and the rest of the library: what a layer must declare, and what a reduction is.

A family derives one class from [`StateSpaceLayer`] and registers it (see `registry.py`). The layer object is a thin
view of a module; it owns no tensors. [`StateSpaceLayer.reduce`] builds everything that a smaller state needs and
writes nothing; `compression/apply.py` commits the results of all layers together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import DimensionError, UnsupportedModelError
from ..systems import DiagonalLTI, Truncation
from .changes import AttributeChange, LayerReduction, ParameterChange, StateForm
from .parameters import successor, why_not_reducible
from .scans.inputs import ScanInputs
from .scans.time_invariant import SystemInputs
from .state_layout import StateLayout


class ScanObserver(Protocol):
    """Something that watches the scans of one layer during a calibration pass."""

    def observe(self, inputs: ScanInputs | SystemInputs, output: Tensor) -> Tensor:
        """Look at a scan and its raw output, before any skip or gate; what is returned goes on in its place."""
        ...


class StateSpaceLayer(ABC):
    """
    A layer of a model, seen as a state-space system whose state can be cut.

    Args:
        name (`str`): The module's qualified name in the model.
        module (`torch.nn.Module`): The module that holds the state's parameters.
        configs (`Sequence`, *optional*): The configs of the module and of the models around it, the innermost first.
    """

    family: ClassVar[str]
    """Name of the family, as used in messages and records."""

    is_selective: ClassVar[bool] = True
    """Whether the layer's system depends on its input, so that its Gramians have to be measured on data."""

    def __init__(self, name: str, module: nn.Module, configs: Sequence[Any] = ()) -> None:
        self.name = name
        self.module = module
        self.configs = list(configs)

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this class can handle the module."""

    @classmethod
    @abstractmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """
        Names of the reductors whose truncations a layer can hold.

        Args:
            stock (`bool`): Whether the stock model class has to load the result.
        """

    @classmethod
    @abstractmethod
    def default_reductor(cls, stock: bool) -> str:
        """The one of [`~StateSpaceLayer.reductors`] that a configuration with `reductor="auto"` means."""

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """Whether a checkpoint of the family can hold another state size in each layer, as a reductor gives it."""
        return False

    @property
    @abstractmethod
    def state_size(self) -> int:
        """The present number of states per channel, N."""

    @property
    def projected_size(self) -> int:
        """How many entries B and C have where they are projected; more than the state size where a layer mixes them."""
        return self.state_size

    narrows: ClassVar[bool] = False
    """Whether the projections of a layer that mixes states can give rows up; see [`NarrowableLayer`]."""

    projections_may_differ: ClassVar[bool] = True
    """Whether a checkpoint can hold layers of the family whose projections are of different sizes."""

    is_mixed: bool = False
    """Whether the layer mixes states now."""

    @property
    def cache_multiple(self) -> int:
        """The number whose multiples are the state sizes that the model's own cache takes."""
        return 1

    @property
    def form(self) -> StateForm:
        """The present state size and projected size."""
        return StateForm(self.state_size, self.projected_size)

    @property
    @abstractmethod
    def layout(self) -> StateLayout:
        """Where the state lies now in the module's parameters and attributes."""

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose shape depends on the state size, by their names inside the module."""
        return self.layout.parameters(self.module)

    def rescaled_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a cut may multiply by a number and whose shape stays, by their names in the module."""
        return {}

    def replaceable_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that a cut may replace, by their names inside the module."""
        return {**self.state_parameters(), **self.rescaled_parameters()}

    def fitted_parameters(self) -> dict[str, str]:
        """
        What a fit to the layer's outputs may change after a cut, whether the layer has it now or not.

        Returns:
            `dict[str, str]`: By the parameter's name inside the module, what of the scan's arguments it multiplies or
                is made of: `"u"`, `"B"` or `"C"`, as [`ScanInputs`] has them. Its state axis is one of the last two.
        """
        return {}

    def saved_state_size(self, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
        """
        The state size of this layer in a state dict, or None where the state dict does not show it.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): All or a part (a shard) of a model's tensors.
            prefix (`str`): The layer's name in it, with a dot at the end.
        """
        return self.layout.size_in(state_dict, prefix)

    def state_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of [`~StateSpaceLayer.state_parameters`] at a state size, by the same names."""
        return self.layout.shapes(size)

    def size_changes(self, size: int) -> list[AttributeChange]:
        """What else in the layer's own modules holds its state size, and its value at another one."""
        return self.layout.size_changes(self.module, size)

    @classmethod
    def config_changes(cls, layers: Sequence[StateSpaceLayer], sizes: Sequence[int]) -> list[AttributeChange]:
        """
        What the config says of the state size when the layers have these sizes; nothing where it says nothing.

        Args:
            layers (`Sequence[StateSpaceLayer]`): All layers of this family in a model, in the model's order.
            sizes (`Sequence[int]`): The state size of each.
        """
        return []

    def resize(self, size: int) -> None:
        """
        Give the state parameters the shapes of another state size, in place, before a load.

        They hold NaN until they are loaded: a load that brings only some of them shows at once.
        """
        shapes, changes = self.state_shapes(size), self.size_changes(size)
        with torch.no_grad():
            for name, parameter in self.state_parameters().items():
                # The parameter's identity stays, so that an optimizer that the user has made keeps it.
                parameter.data = parameter.data.new_full(shapes[name], float("nan"))
                parameter.grad = None
        for change in changes:
            change.write()

    def saved_form(self, state_dict: Mapping[str, Tensor], prefix: str) -> StateForm | None:
        """
        State size and projected size of this layer in a state dict, or None where the state dict does not show it.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): All or a part (a shard) of a model's tensors.
            prefix (`str`): The layer's name in it, with a dot at the end.
        """
        size = self.saved_state_size(state_dict, prefix)
        return None if size is None else StateForm(size, size)

    def shapes_of_form(self, form: StateForm) -> dict[str, tuple[int, ...]]:
        """The shapes that a state dict has in a form (state size and projected size), by parameter name."""
        return self.state_shapes(form.size)

    def take_form(self, form: StateForm) -> None:
        """Give the layer another state size and projected size, in place, before a load; see [`resize`]."""
        self.resize(form.size)

    def restoration(
        self, values: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]], form: StateForm
    ) -> LayerReduction:
        """
        What takes the layer back to a form that it had, with tensors from then. Nothing is written.

        Args:
            values (`Mapping[str, torch.Tensor]`): What a cut replaced, by name inside the module.
            states (`Mapping[str, Mapping]`): The optimizer's state of each, by the same names.
            form ([`StateForm`]): State size and projected size.

        Raises:
            [`~errors.DimensionError`]: a tensor is missing, or has not the shape that the layer needs.
        """
        rescaled = {name: p for name, p in self.rescaled_parameters().items() if name in values}
        shapes = {**self.state_shapes(form.size), **{name: tuple(p.shape) for name, p in rescaled.items()}}
        changes = self._put_back({**self.state_parameters(), **rescaled}, values, states, shapes)
        return LayerReduction(self, changes, self.size_changes(form.size), *form)

    def _put_back(
        self,
        parameters: Mapping[str, nn.Parameter],
        values: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Any]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[ParameterChange]:
        changes = []
        for name, parameter in parameters.items():
            found = values.get(name)
            if found is None or tuple(found.shape) != shapes[name]:
                what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise DimensionError(f"{self.name}.{name} {what} in the snapshot; it must have shape {shapes[name]}.")
            state = {key: _on_device(value, parameter.device) for key, value in states.get(name, {}).items()}
            changes.append(ParameterChange(parameter, successor(parameter, found), optimizer_state=state))
        return changes

    def system(self) -> DiagonalLTI | None:
        """
        The layer as a time-invariant system, or a batch of them, with the gradient cut off.

        Returns:
            [`~systems.DiagonalLTI`] or `None`: None for a selective layer, whose Gramians have to be measured on data.
        """
        return

    @abstractmethod
    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass of the layer shows its recurrence to the observer."""

    @abstractmethod
    def reduce(self, truncation: Truncation) -> LayerReduction:
        """
        Build the tensors and sizes of the layer with a smaller state. Nothing is written.

        Raises:
            [`~errors.DimensionError`]: the truncation is for another state size.
            [`~errors.TruncationError`]: the layer's parameters cannot hold it.
        """

    def reduce_alike(self, truncation: Truncation) -> LayerReduction:
        """
        Cut a copy of a layer, such as an average of its weights over steps, with the truncation of the layer itself.

        The states of both keep standing for the same thing, so that the average can go on. Nothing is written.

        Raises:
            [`~errors.DimensionError`]: the truncation is for another state size.
            [`~errors.TruncationError`]: the layer's parameters cannot hold it.
        """
        return self.reduce(truncation)

    def require_form(self, stock: bool, reductor: str) -> None:
        """
        Raise when the layer cannot be cut with these settings; what no setting can cut, `require_reducible` refuses.

        Args:
            stock (`bool`): Whether the stock model class has to load the result.
            reductor (`str`): The reductor's name.

        Raises:
            [`~errors.UnsupportedModelError`]: an adapter holds a module that would be cut.
        """
        return

    def require_reducible(self) -> None:
        """
        Raise when the layer's parameters are in a form that cannot be cut.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter is sharded, quantised, empty, on the meta device,
                parametrised, or wrapped by an adapter, or its shape disagrees with the layer's state size.
        """
        self._require_plain({**self.state_parameters(), **self.rescaled_parameters()})
        n_states, expected = self.state_size, self.state_shapes(self.state_size)
        for name, parameter in self.state_parameters().items():
            if tuple(parameter.shape) != expected[name]:
                raise UnsupportedModelError(
                    f"{self.name}.{name} has shape {tuple(parameter.shape)}; a state size of {n_states} needs "
                    f"{expected[name]}. The parameter may be sharded or flattened by a wrapper."
                )

    def _require_plain(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            problem = why_not_reducible(parameter)
            if problem:
                raise UnsupportedModelError(
                    f"{self.name}.{name} {problem}. Load the model in a plain floating-point form on one device, "
                    "compress it, and apply that treatment afterwards."
                )

    def require_own_size(self, truncation: Truncation) -> None:
        """
        Raise when a truncation is for another state size.

        Raises:
            [`~errors.DimensionError`]: it is.
        """
        if truncation.full_size != self.state_size:
            raise DimensionError(
                f"the truncation is for {truncation.full_size} states; {self.name} has {self.state_size}."
            )


def _on_device(value: Any, device: torch.device) -> Any:
    # Adam keeps its step counter on the CPU on purpose.
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.numel() == 1 else value.to(device=device, copy=True)


SumOverProcesses = Callable[[Tensor], Tensor]
"""Adds a float64 tensor over all processes and returns the sum; the identity in a single process."""
