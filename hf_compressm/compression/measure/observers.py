"""Three ways to estimate the Gramians of a selective layer during a calibration pass.

None of them ever holds all states: the Gramians of `ops` walk along the sequence in chunks. What a scan's Gramians are
is known by its [`~architectures.ScanInputs`], so nothing here depends on the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...architectures import ScanInputs, SumOverProcesses, TimeAverages
from ...errors import CalibrationError
from ...systems import DiagonalLTI, OutputSamples
from .layer_gramians import EmpiricalGramians
from .output_samples import joined, sample_outputs, side_by_side

# Gradients of a mean loss vanish in float16. A power of two this size keeps them and changes no digit of the others.
LOSS_SCALE = 2.0**12


class GramianObserver(ABC):
    """Watches the scans of one layer and sums what its Gramians need."""

    needs_loss_gradient: bool = False
    """Whether the pass must propagate the loss back to the scan's output."""

    loss_terms: int | None = None
    """
    How many terms the mean loss of the present batch has; adjoint states of the sum weigh all examples alike. None
    where no gradient of the loss is on its way: one that the loss function takes for itself is none.
    """

    @abstractmethod
    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Look at a scan and its raw output, before any skip or gate; what is returned goes on in its place."""

    @abstractmethod
    def unreached(self) -> str | None:
        """What the calibration batches did not do with the layer, or None where its Gramians are known."""

    @abstractmethod
    def sums(self) -> Any:
        """What was summed so far, to go back to with [`go_back_to`]."""

    @abstractmethod
    def go_back_to(self, sums: Any) -> None:
        """Forget what was seen since [`sums`] gave this."""

    @abstractmethod
    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """
        The Gramians of everything that all processes have seen, of a layer that was reached.

        Raises:
            [`~errors.CalibrationError`]: what was summed is not finite.
        """


@dataclass
class _Sums:
    """What was summed over the scans of one part of a layer."""

    P: Tensor | float = 0.0
    Q: Tensor | float = 0.0
    readout_energy: Tensor | float = 0.0
    R: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    rows: int = 0
    samples: OutputSamples | None = None
    passes: int = 0


class _SampledGramians(GramianObserver):
    """
    Sums of sampled states and adjoint states.

    Args:
        generator (`torch.Generator`): Draws the sampled time steps.
        samples_outputs (`bool`, *optional*, defaults to `False`): Whether to keep sampled steps to fit a readout to.
    """

    def __init__(self, generator: torch.Generator, samples_outputs: bool = False) -> None:
        self._generator = generator
        self._samples_outputs = samples_outputs
        self._sums: dict[int | None, _Sums] = {}

    def _add_states(self, inputs: ScanInputs) -> Tensor:
        times = inputs.sample_times(self._generator)
        P, readout_energy = inputs.state_gramian(times)
        sums = self._sums.setdefault(inputs.part, _Sums())
        sums.P, sums.readout_energy = sums.P + P, sums.readout_energy + readout_energy
        sums.R = sums.R + inputs.rows * inputs.readout_gramian().to(P.device)
        sums.squares = sums.squares + inputs.rows * inputs.squares().to(P.device)
        sums.rows += inputs.rows
        return times

    def _add_adjoint_states(self, inputs: ScanInputs, grad_output: Tensor, times: Tensor, weight: float = 1.0) -> None:
        sums = self._sums[inputs.part]
        sums.Q = sums.Q + weight * inputs.adjoint_gramian(grad_output, times)
        if self._samples_outputs:
            sums.passes += 1
            samples = sample_outputs(inputs, grad_output, self._generator, weight)
            sums.samples = joined(sums.samples, samples, sums.passes, self._generator)

    def unreached(self) -> str | None:
        """What the calibration batches did not do with the layer, or None where its Gramians are known."""
        if not self._sums:
            return "run"
        return "reached by the gradient" if any(isinstance(part.Q, float) for part in self._sums.values()) else None

    def sums(self) -> dict[int | None, _Sums]:
        """What was summed so far; sums are replaced, never written to."""
        return {part: replace(sums) for part, sums in self._sums.items()}

    def go_back_to(self, sums: dict[int | None, _Sums]) -> None:
        """Forget what was seen since."""
        self._sums = sums

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """The Gramians of everything that all processes have seen."""
        parts = list(_in_order(self._sums).values())
        names = ("P", "Q", "readout_energy", "R", "squares")
        sums = [_side_by_side(self._sums, name) for name in names]
        rows = sums[0].new_tensor([float(parts[0].rows)])
        totals = sum_over_processes(torch.cat([*(total.flatten() for total in sums), rows]))
        *totals, rows = totals.split([*(total.numel() for total in sums), 1])
        # Decompositions of matrices of this size take a GPU longer than a CPU.
        means = ((found.reshape(total.shape) / rows).cpu() for found, total in zip(totals, sums))
        samples = parts[0].samples if None in self._sums else side_by_side([part.samples for part in parts])
        return replace(_validated(layer_name, *means), samples=samples)


def _in_order(by_part: dict[int | None, Any]) -> dict[int | None, Any]:
    """The same entries in the order of the layer's parts, which are numbers, or None alone."""
    return dict(sorted(by_part.items(), key=lambda item: -1 if item[0] is None else item[0]))


def _side_by_side(by_part: dict[int | None, Any], name: str) -> Tensor:
    """One attribute of every part: along a new first axis where the layer has parts, as it is where it has none."""
    tensors = [getattr(part, name) for part in _in_order(by_part).values()]
    return tensors[0] if None in by_part else torch.stack(tensors)


def _validated(
    layer_name: str, P: Tensor, Q: Tensor, readout_energy: Tensor, R: Tensor, squares: Tensor | None = None
) -> EmpiricalGramians:
    if not all(torch.isfinite(tensor).all() for tensor in (P, Q, readout_energy, R)):
        raise CalibrationError(
            f"the Gramians of {layer_name} are not finite; its states or the loss gradient overflow on the calibration "
            "batches. Check the loss, or lower the learning rate."
        )
    return EmpiricalGramians((P + P.mT) / 2, (Q + Q.mT) / 2, readout_energy, (R + R.mT) / 2, squares)


class AdjointTap(torch.autograd.Function):
    """The identity on the scan's output that hands its gradient on to an observer."""

    @staticmethod
    def forward(ctx, output: Tensor, trigger: Tensor, receive) -> Tensor:
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        ctx.receive(grad_output)
        # The trigger's gradient is asked for only so that every tap is visited; its value is of no use.
        return grad_output, grad_output.new_zeros(()), None


def passed_on(output: Tensor, trigger: Tensor) -> Tensor:
    """
    The scan's output where an activation checkpoint runs its layer again while the loss's gradient is on its way.

    The layer was observed the first time. The checkpoint asks for the same nodes as then, so one stands here too.
    """
    return AdjointTap.apply(output, trigger, lambda grad_output: None)


class LossGradientObserver(_SampledGramians):
    r"""
    States, and adjoint states \\( g = \partial \mathrm{loss} / \partial h \\).

    The observability Gramian then weighs each state by what it does to the task. Source: adjoint snapshots, Rowley,
    2005 (balanced POD); Otto, Padovan and Rowley, 2022 (covariance balancing reduction using adjoint snapshots).

    Args:
        generator (`torch.Generator`): Draws the sampled time steps.
        trigger (`torch.Tensor`): A scalar leaf that requires a gradient, shared by all observers of a pass;
            `torch.autograd.grad(LOSS_SCALE * loss, trigger)` visits every observed scan without touching any `.grad`.
        samples_outputs (`bool`, *optional*, defaults to `False`): Whether to keep sampled steps to fit a readout to.
    """

    needs_loss_gradient = True

    def __init__(self, generator: torch.Generator, trigger: Tensor, samples_outputs: bool = False) -> None:
        super().__init__(generator, samples_outputs)
        self._trigger = trigger

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Sum the states now and the adjoint states when the loss's gradient arrives."""
        if self.loss_terms is not None:
            return passed_on(output, self._trigger)
        detached = inputs.detached()
        times = self._add_states(detached)

        def receive(grad_output: Tensor) -> None:
            if self.loss_terms is not None:
                self._add_adjoint_states(detached, grad_output, times, weight=(self.loss_terms / LOSS_SCALE) ** 2)

        return AdjointTap.apply(output, self._trigger, receive)


class WhiteNoiseObserver(_SampledGramians):
    """States, and adjoint states of random outputs (independent signs): the classical observability Gramian."""

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Sum the states and the adjoint states of a random output gradient."""
        times = self._add_states(inputs)
        signs = torch.randint(0, 2, output.shape, generator=self._generator)
        probe = signs.to(device=output.device, dtype=torch.float32) * 2 - 1
        self._add_adjoint_states(inputs, probe, times)
        return output


class AveragedObserver(GramianObserver):
    r"""
    The closed form of the layer with \\( \Delta_t, B_t, C_t \\) replaced by their means over the data.

    The simplest extension of the theory of time-invariant systems to a selective layer; kept as an option and an
    ablation. Channel d becomes the system \\( \lambda = e^{\bar\Delta_d A_d}, b = \bar\Delta_d \bar B, c = \bar C \\),
    and the channels' Gramians are added. A head of a multi-head layer has one pole for all its states, so such a layer
    shows one direction a group.
    """

    def __init__(self) -> None:
        self._sums: dict[int | None, Tensor] = {}
        self._systems: dict[int | None, Callable[[Tensor], DiagonalLTI]] = {}

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Sum the time steps of each channel, and B and C of each state."""
        if not isinstance(inputs, TimeAverages):
            raise CalibrationError(
                "gramians='averaged' is a system of the means over time, and a recurrence of this kind "
                f"({type(inputs).__name__.removesuffix('Inputs')}) has no means over time that make one; use "
                "gramians='loss_gradient' or 'white_noise'."
            )
        self._systems[inputs.part] = inputs.averaged_systems()
        self._sums[inputs.part] = self._sums.get(inputs.part, 0.0) + inputs.sums()
        return output

    def unreached(self) -> str | None:
        """What the calibration batches did not do with the layer, or None where its means are known."""
        return None if self._sums else "run"

    def sums(self) -> dict[int | None, Tensor]:
        """What was summed so far; sums are replaced, never written to."""
        return dict(self._sums)

    def go_back_to(self, sums: dict[int | None, Tensor]) -> None:
        """Forget what was seen since."""
        self._sums = sums

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """The summed closed-form Gramians of the averaged channels."""
        sums = sum_over_processes(torch.stack(list(_in_order(self._sums).values())))
        found = {
            part: _summed_gramians(systems(total[:-1] / total[-1]))
            for (part, systems), total in zip(_in_order(self._systems).items(), sums)
        }
        return _validated(layer_name, *(_side_by_side(found, name) for name in ("P", "Q", "readout_energy", "R")))


def _summed_gramians(channels: DiagonalLTI) -> EmpiricalGramians:
    """The closed-form Gramians of systems `(..., channels)` with one readout, summed over the channels."""
    P = channels.controllability_gramian().real.sum(-3)
    Q = channels.observability_gramian().real.sum(-3)
    readout = channels.C.real[..., 0, 0, :]
    R = readout.unsqueeze(-1) * readout.unsqueeze(-2)
    return EmpiricalGramians(P, Q, P.diagonal(dim1=-2, dim2=-1) * readout.square(), R)


def make_observer(
    gramians: str, generator: torch.Generator, trigger: Tensor, samples_outputs: bool = False
) -> GramianObserver:
    """
    The observer for a value of `CompreSSMConfig.gramians`.

    Args:
        gramians (`str`): `"loss_gradient"`, `"white_noise"` or `"averaged"`.
        generator (`torch.Generator`): Draws sampled time steps and probes.
        trigger (`torch.Tensor`): The scalar leaf of a [`LossGradientObserver`].
        samples_outputs (`bool`, *optional*, defaults to `False`): Whether to keep sampled steps to fit a readout to;
            averages over time have none.
    """
    if gramians == "loss_gradient":
        return LossGradientObserver(generator, trigger, samples_outputs)
    return WhiteNoiseObserver(generator, samples_outputs) if gramians == "white_noise" else AveragedObserver()
