r"""
What the time-invariant families share: a reduced system, written into the layer's own parameters and read back.

A family says how its parameters hold a diagonal system; the checks are here. Parameters are rounded to the layer's
dtype, so what counts is the system that the written layer computes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...errors import TruncationError
from ...systems import COARSE_RESOLUTION, DiagonalLTI, Truncation, project, reductor_names, require_error_bound
from ..changes import AttributeChange, LayerReduction, ParameterChange
from ..contract import ScanObserver, StateSpaceLayer
from ..moment_maps.axis import AxisMap
from ..moment_maps.modal import ModalMap
from ..parameters import successor, with_parameters
from ..scans.time_invariant import watching_system
from ..state_layout import SizeAttribute, StateAxis, StateLayout, rows_of_identity, runs

# Share of a response's size that rounding the written parameters may change; 1e-3 is a tenth of the error that a
# tolerance of 1% stands for.
_ALLOWED_ROUNDING = 1e-3
_SMALLEST_POLE = 1e-6


class TimeInvariantLayer(StateSpaceLayer):
    """A layer with a diagonal linear time-invariant system, or one in each channel."""

    is_selective = False

    parameter_names: tuple[str, ...]
    """The parameters whose shape depends on the state size."""

    complex_parameters: tuple[str, ...]
    """Those of them that hold complex numbers, as pairs along their last axis."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module has the family's parameters, a state size, and gives its system."""
        known = all(isinstance(getattr(module, name, None), Tensor) for name in (*cls.parameter_names, "D"))
        return (
            known and isinstance(getattr(module, "state_size", None), int) and callable(getattr(module, "system", None))
        )

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """Balanced truncation, made diagonal again, interpolative, which keeps poles, and selection."""
        return reductor_names(lambda reductor: reductor.reduces_systems)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Balanced truncation."""
        return "balanced"

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """Whether a checkpoint of the family can hold another state size in each layer: always."""
        return True

    @property
    def state_size(self) -> int:
        """The present number of complex states, N."""
        return self.module.state_size

    @property
    def layout(self) -> StateLayout:
        """The axes of the parameters, and the module's own state size."""
        return StateLayout(self.axes(), (SizeAttribute("", "state_size", runs()),))

    @abstractmethod
    def axes(self) -> tuple[StateAxis, ...]:
        """The axis of each of the parameters along which the states lie."""

    @classmethod
    def config_changes(cls, layers: Sequence[StateSpaceLayer], sizes: Sequence[int]) -> list[AttributeChange]:
        """`state_size` of each config: a number where all of its layers have one size, else a list."""
        by_config: dict[int, tuple[object, list[int]]] = {}
        for layer, size in zip(layers, sizes):
            config = getattr(layer.module, "config", None)
            if config is not None:
                by_config.setdefault(id(config), (config, []))[1].append(int(size))
        return [
            AttributeChange(config, "state_size", found[0] if len(set(found)) == 1 else found)
            for config, found in by_config.values()
        ]

    @abstractmethod
    def system_of(self, module: nn.Module) -> DiagonalLTI:
        """The system that a module of this family computes, with the gradient cut off."""

    @abstractmethod
    def written(self, reduced: DiagonalLTI) -> dict[str, Tensor]:
        """The values of the parameters that hold a reduced system, float64, by name."""

    @abstractmethod
    def readout_parameter(self, C: Tensor) -> Tensor:
        """
        The values of the parameter `C`, float64, that give the layer as it is another readout.

        Args:
            C (`torch.Tensor` of the shape of the system's `C`): Readout of the system, complex128.
        """

    @torch.no_grad()
    def write_readout(self, C: Tensor) -> None:
        """
        Give the layer as it is another readout, in place; its poles and inputs stay.

        Args:
            C (`torch.Tensor` of the shape of the system's `C`): Readout of the system, complex.

        Raises:
            [`~errors.TruncationError`]: it is not finite in the dtype of the parameter. Nothing was changed.
        """
        parameter = self.module.C
        values = self.readout_parameter(C.to(parameter.device, torch.complex128)).to(parameter)
        if not torch.isfinite(values).all():
            raise TruncationError(f"the readout of {self.name} is not finite in {parameter.dtype}.")
        parameter.copy_(values)

    @abstractmethod
    def moment_maps(self, truncation: Truncation, values: Mapping[str, Tensor]) -> dict[str, AxisMap]:
        """
        How gradients move under a truncation that mixes states, by parameter name; a missing one is reset.

        Args:
            truncation ([`~systems.Truncation`]): The cut.
            values (`Mapping[str, torch.Tensor]`): What [`~TimeInvariantLayer.written`] gave.
        """

    def selected(self, indices: Tensor) -> tuple[dict[str, Tensor], dict[str, AxisMap]]:
        """The values of the parameters that keep some of the states as they are, and how their gradients move."""
        rows = rows_of_identity(indices, self.state_size)
        parameters, axes = self.state_parameters(), self.layout.by_name
        values = {name: axes[name].take(old.detach(), indices.to(old.device)) for name, old in parameters.items()}
        maps = {
            name: ModalMap(axis.axis, rows, indices, has_pairs=name in self.complex_parameters)
            for name, axis in axes.items()
        }
        return values, maps

    @torch.no_grad()
    def system(self) -> DiagonalLTI:
        """The layer as a time-invariant system, or a batch of them, with the gradient cut off."""
        return self.system_of(self.module)

    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass of the layer shows its input and output to the observer."""
        return watching_system(self.module, self.system(), observer)

    @torch.no_grad()
    def reduce(self, truncation: Truncation) -> LayerReduction:
        """
        Build the layer's tensors and sizes for a smaller state.

        The layer as it would be after the cut, in the dtype of its parameters, has to be stable, finite, and as close
        to the reduced system as its peak response times 1e-3 (or 64 roundings of a wider dtype).

        Raises:
            [`~errors.DimensionError`]: the truncation is for another state size.
            [`~errors.TruncationError`]: the written layer fails one of these checks.
        """
        return self._reduction(truncation, neglect_coupling=False)

    @torch.no_grad()
    def reduce_alike(self, truncation: Truncation) -> LayerReduction:
        """
        Cut a copy of a layer, such as an average of its weights over steps, with the truncation of the layer itself.

        That truncation makes the layer's own state matrix diagonal, and the copy's nearly so; what is left beside the
        diagonal is neglected. Raises what [`~TimeInvariantLayer.reduce`] raises.
        """
        return self._reduction(truncation, neglect_coupling=True)

    def _reduction(self, truncation: Truncation, neglect_coupling: bool) -> LayerReduction:
        self.require_own_size(truncation)
        # A GPU takes many small decompositions one after the other, each slower than a CPU.
        truncation = truncation.to("cpu")
        reduced = project(self.system().to("cpu"), truncation, neglect_coupling)
        if truncation.is_selection:
            values, maps = self.selected(truncation.indices)
        else:
            values = self.written(reduced)
            maps = self.moment_maps(truncation, values)
            if truncation.active is not None:
                self._revive(values, ~truncation.active)
        parameters = [
            ParameterChange(old, successor(old, values[name]), maps.get(name))
            for name, old in self.state_parameters().items()
        ]
        self._require_written(reduced, {name: change.new for name, change in zip(self.parameter_names, parameters)})
        size = truncation.state_size
        return LayerReduction(self, parameters, self.size_changes(size), size)

    def _revive(self, values: Mapping[str, Tensor], inert: Tensor) -> None:
        """
        Give inert states the poles and inputs of old states, and leave their readout at zero.

        The response is the same, and unlike a state whose input and readout are both zero, it can be trained.
        """
        for name, parameter in self.state_parameters().items():
            if name != "C":
                old = parameter.detach().to(values[name])
                values[name][inert] = old.narrow(inert.ndim - 1, 0, inert.shape[-1])[inert]

    def _require_written(self, reduced: DiagonalLTI, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if not torch.isfinite(parameter).all():
                raise TruncationError(
                    f"{self.name}.{name} is not finite in {parameter.dtype} after the cut; choose another rank, or "
                    "leave this layer as it is."
                )
        found = self.system_of(with_parameters(self.module, parameters)).to("cpu")
        if not found.is_stable():
            raise TruncationError(
                f"{self.name} is not stable after the cut, in the dtype of its parameters: max|lam| = "
                f"{found.lam.abs().amax():.9g}. Choose another rank, or leave this layer as it is."
            )
        share = max(_ALLOWED_ROUNDING, 64 * max(torch.finfo(parameter.dtype).eps for parameter in parameters.values()))
        # The Hankel norm is a lower bound on the peak response, and known without a search over frequencies.
        require_error_bound(reduced, found, share * reduced.hankel_singular_values(COARSE_RESOLUTION)[..., 0])


def clamped_poles(lam: Tensor) -> Tensor:
    """Poles with their absolute value at least 1e-6: families hold the logarithm, and a pole at 0 acts in one step."""
    radius = lam.abs().clamp_min(_SMALLEST_POLE)
    return torch.polar(radius, lam.angle())
