"""Three ways to estimate the Gramians of a selective layer during a calibration pass.

None of them ever holds all states: `ops/selective_gramians.py` walks along the sequence in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..architectures import ScanInputs, SumOverProcesses
from ..errors import CalibrationError
from ..ops import adjoint_gramian, default_sample_count, sample_times, state_gramian
from ..systems import DiagonalLTI
from .gramians import EmpiricalGramians

# Gradients of a mean loss vanish in float16. A power of two this size keeps them and changes no digit of the others.
LOSS_SCALE = 2.0**12


class GramianObserver(ABC):
    """Watches the scans of one layer and sums what its Gramians need."""

    needs_loss_gradient: bool = False
    """Whether the pass must propagate the loss back to the scan's output."""

    loss_terms: int = 1
    """How many terms the mean loss of the present batch has; adjoint states of the sum weigh all examples alike."""

    @abstractmethod
    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Look at a scan and its raw output `(batch, length, channels)`; what is returned goes on in its place."""

    @abstractmethod
    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """
        The Gramians of everything that all processes have seen.

        Raises:
            [`~errors.CalibrationError`]: the layer was never run, or what was summed is not finite.
        """


class _SampledGramians(GramianObserver):
    """Sums of sampled states and adjoint states."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._P = self._Q = self._readout_energy = None
        self._rows = 0

    def _add_states(self, inputs: ScanInputs) -> Tensor | None:
        batch, length, channels = inputs.u.shape
        times = sample_times(batch, length, default_sample_count(length, inputs.A.shape[1]), self._generator)
        P, readout_energy = state_gramian(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, times=times)
        self._P = P if self._P is None else self._P + P
        self._readout_energy = readout_energy if self._readout_energy is None else self._readout_energy + readout_energy
        self._rows += batch * length * channels
        return times

    def _add_adjoint_states(
        self, inputs: ScanInputs, grad_output: Tensor, times: Tensor | None, weight: float = 1.0
    ) -> None:
        Q = weight * adjoint_gramian(inputs.delta, inputs.A, inputs.C, grad_output, times=times)
        self._Q = Q if self._Q is None else self._Q + Q

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """The Gramians of everything that all processes have seen."""
        if self._P is None or self._Q is None:
            what = "run by" if self._P is None else "reached by the gradient of"
            raise CalibrationError(
                f"{layer_name} was not {what} the calibration batches, so its Gramians are unknown. Calibrate with "
                "batches that use every state-space layer."
            )
        sums = torch.cat(
            [
                self._P.flatten(),
                self._Q.flatten(),
                self._readout_energy,
                self._P.new_tensor([float(self._rows)]),
            ]
        )
        sums = sum_over_processes(sums)
        return _means(layer_name, sums, self._P.shape[0])


def _means(layer_name: str, sums: Tensor, n_states: int) -> EmpiricalGramians:
    P, Q, readout_energy, rows = sums.split([n_states**2, n_states**2, n_states, 1])
    if not torch.isfinite(sums).all():
        raise CalibrationError(
            f"the Gramians of {layer_name} are not finite; its states or the loss gradient overflow on the calibration "
            "batches. Check the loss, or lower the learning rate."
        )
    P, Q = (M.reshape(n_states, n_states) / rows for M in (P, Q))
    return EmpiricalGramians((P + P.mT) / 2, (Q + Q.mT) / 2, readout_energy / rows)


class _AdjointTap(torch.autograd.Function):
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


class LossGradientObserver(_SampledGramians):
    r"""
    States, and adjoint states \\( g = \partial \mathrm{loss} / \partial h \\).

    The observability Gramian then weighs each state by what it does to the task. Source: adjoint snapshots, Rowley,
    2005 (balanced POD); Otto, Padovan and Rowley, 2022 (covariance balancing reduction using adjoint snapshots).

    Args:
        generator (`torch.Generator`): Draws the sampled time steps.
        trigger (`torch.Tensor`): A scalar leaf that requires a gradient, shared by all observers of a pass;
            `torch.autograd.grad(LOSS_SCALE * loss, trigger)` visits every observed scan without touching any `.grad`.
    """

    needs_loss_gradient = True

    def __init__(self, generator: torch.Generator, trigger: Tensor) -> None:
        super().__init__(generator)
        self._trigger = trigger

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Sum the states now and the adjoint states when the loss's gradient arrives."""
        detached = ScanInputs(*(getattr(inputs, name).detach() for name in ("u", "delta", "A", "B", "C")))
        times = self._add_states(detached)

        def receive(grad_output: Tensor) -> None:
            self._add_adjoint_states(detached, grad_output, times, weight=(self.loss_terms / LOSS_SCALE) ** 2)

        return _AdjointTap.apply(output, self._trigger, receive)


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
    and the channels' Gramians are added.
    """

    def __init__(self) -> None:
        self._A = None
        self._sums = None

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Sum time steps per channel, and B and C per state."""
        rows = inputs.delta.shape[0] * inputs.delta.shape[1]
        sums = torch.cat([t.double().sum((0, 1)) for t in (inputs.delta, inputs.B, inputs.C)])
        sums = torch.cat([sums, sums.new_tensor([float(rows)])])
        self._A = inputs.A.detach().double()
        self._sums = sums if self._sums is None else self._sums + sums
        return output

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> EmpiricalGramians:
        """The summed closed-form Gramians of the averaged channels."""
        if self._sums is None:
            raise CalibrationError(f"{layer_name} was not run by the calibration batches, so its means are unknown.")
        channels, n_states = self._A.shape
        sums = sum_over_processes(self._sums)
        delta, B, C = (sums[:-1] / sums[-1]).split([channels, n_states, n_states])
        system = DiagonalLTI(
            lam=torch.exp(delta[:, None] * self._A),
            B=(delta[:, None] * B)[..., None],
            C=C.expand(channels, 1, n_states),
        )
        P = system.controllability_gramian().real.sum(0)
        Q = system.observability_gramian().real.sum(0)
        readout_energy = P.diagonal() * C.square()
        return _means(layer_name, torch.cat([P.flatten(), Q.flatten(), readout_energy, P.new_ones(1)]), n_states)


def make_observer(gramians: str, generator: torch.Generator, trigger: Tensor) -> GramianObserver:
    """
    The observer for a value of `CompreSSMConfig.gramians`.

    Args:
        gramians (`str`): `"loss_gradient"`, `"white_noise"` or `"averaged"`.
        generator (`torch.Generator`): Draws sampled time steps and probes.
        trigger (`torch.Tensor`): The scalar leaf of a [`LossGradientObserver`].
    """
    if gramians == "loss_gradient":
        return LossGradientObserver(generator, trigger)
    return WhiteNoiseObserver(generator) if gramians == "white_noise" else AveragedObserver()
