"""Gramians of a time-invariant layer from what it sees during a calibration pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...architectures import SumOverProcesses, SystemInputs
from ...errors import CalibrationError
from ...systems import DiagonalLTI
from .layer_gramians import ClosedFormGramians, WeightedGramians
from .observers import LOSS_SCALE, AdjointTap, GramianObserver


@dataclass(frozen=True)
class _Sums:
    """What was summed over the passes of one layer."""

    P: Tensor
    Q: Tensor
    rows: int = 0
    passes_without_loss: int = 0
    passes_with_gradient: int = 0


class SystemObserver(GramianObserver):
    """
    Sums the states of a time-invariant layer, and its adjoint states where a loss reaches it.

    Args:
        system ([`~systems.DiagonalLTI`]): The layer's system.
        generator (`torch.Generator`): Draws the sampled time steps.
        trigger (`torch.Tensor`, *optional*): A scalar leaf that requires a gradient, as of a [`LossGradientObserver`];
            without it only the states are summed.
    """

    def __init__(self, system: DiagonalLTI, generator: torch.Generator, trigger: Tensor | None = None) -> None:
        self._system = system
        self._generator = generator
        self._trigger = trigger
        size = (*system.batch_shape, system.order, system.order)
        zeros = torch.zeros(size, dtype=torch.complex128, device=system.lam.device)
        self._sums = _Sums(zeros, zeros)

    def observe(self, inputs: SystemInputs, output: Tensor) -> Tensor:
        """Sum the states now, and the adjoint states when the loss's gradient arrives."""
        detached = inputs.detached()
        times = detached.sample_times(self._generator)
        sums = self._sums
        with_gradient = self._trigger is not None and torch.is_grad_enabled()
        self._sums = replace(
            sums,
            P=sums.P + detached.state_gramian(times).to(sums.P.device),
            rows=sums.rows + detached.rows,
            passes_without_loss=sums.passes_without_loss + 1,
            passes_with_gradient=sums.passes_with_gradient + with_gradient,
        )
        if not with_gradient:
            return output

        def receive(grad_output: Tensor) -> None:
            if self.loss_terms is None:
                return
            weight = (self.loss_terms / LOSS_SCALE) ** 2
            sums = self._sums
            Q = sums.Q + weight * detached.adjoint_gramian(grad_output, times).to(sums.Q.device)
            self._sums = replace(sums, Q=Q, passes_without_loss=sums.passes_without_loss - 1)

        return AdjointTap.apply(output, self._trigger, receive)

    def unreached(self) -> str | None:
        """What the calibration batches did not do with the layer, or None where its Gramians are known."""
        if not self._sums.rows:
            return "run"
        without = self._trigger is not None and not self._sums.passes_with_gradient
        return "reached by the gradient" if without else None

    def sums(self) -> _Sums:
        """What was summed so far; sums are replaced, never written to."""
        return self._sums

    def go_back_to(self, sums: _Sums) -> None:
        """Forget what was seen since."""
        self._sums = sums

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> ClosedFormGramians:
        """
        The Gramians of everything that all processes have seen.

        Without a loss in some pass of some process, the observability Gramian is that of the closed form; a layer that
        no batch has reached has both in closed form.

        Raises:
            [`~errors.CalibrationError`]: what was summed is not finite.
        """
        P, Q = self._sums.P, self._sums.Q
        counts = P.real.new_tensor([float(self._sums.rows), float(self._sums.passes_without_loss)])
        flat = torch.cat([*(torch.view_as_real(total).flatten() for total in (P, Q)), counts])
        *totals, counts = sum_over_processes(flat).split([2 * P.numel(), 2 * Q.numel(), 2])
        rows, without_loss = counts.tolist()
        if not rows:
            return ClosedFormGramians(self._system)
        P, Q = (torch.view_as_complex(total.reshape(*P.shape, 2)) / rows for total in totals)
        if not (torch.isfinite(torch.view_as_real(P)).all() and torch.isfinite(torch.view_as_real(Q)).all()):
            raise CalibrationError(
                f"the Gramians of {layer_name} are not finite; its states or the loss gradient overflow on the "
                "calibration batches. Check the loss, or lower the learning rate."
            )
        return WeightedGramians(self._system, P, None if without_loss else Q)
