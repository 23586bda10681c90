"""Gramians of a time-invariant layer from what it sees during a calibration pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...architectures import SumOverProcesses, SystemInputs
from ...errors import CalibrationError
from .layer_gramians import ClosedFormGramians, WeightedGramians
from .observers import LOSS_SCALE, AdjointTap, GramianObserver


class SystemObserver(GramianObserver):
    """
    Sums the states of a time-invariant layer, and its adjoint states where a loss reaches it.

    Args:
        system ([`~systems.DiagonalLTI`]): The layer's system.
        generator (`torch.Generator`): Draws the sampled time steps.
        trigger (`torch.Tensor`, *optional*): A scalar leaf that requires a gradient, as of a [`LossGradientObserver`];
            without it only the states are summed.
    """

    def __init__(self, system, generator: torch.Generator, trigger: Tensor | None = None) -> None:
        self._system = system
        self._generator = generator
        self._trigger = trigger
        size = (*system.batch_shape, system.order, system.order)
        self._P, self._Q = (torch.zeros(size, dtype=torch.complex128, device=system.lam.device) for _ in range(2))
        self._rows = 0
        self._passes_without_loss = 0

    def observe(self, inputs: SystemInputs, output: Tensor) -> Tensor:
        """Sum the states now, and the adjoint states when the loss's gradient arrives."""
        detached = inputs.detached()
        times = detached.sample_times(self._generator)
        self._P += detached.state_gramian(times).to(self._P.device)
        self._rows += detached.rows
        self._passes_without_loss += 1
        if self._trigger is None or not torch.is_grad_enabled():
            return output

        def receive(grad_output: Tensor) -> None:
            weight = (self.loss_terms / LOSS_SCALE) ** 2
            self._Q += weight * detached.adjoint_gramian(grad_output, times).to(self._Q.device)
            self._passes_without_loss -= 1

        return AdjointTap.apply(output, self._trigger, receive)

    def result(self, layer_name: str, sum_over_processes: SumOverProcesses) -> ClosedFormGramians:
        """
        The Gramians of everything that all processes have seen.

        Without a loss in some pass of some process, the observability Gramian is that of the closed form; a layer that
        no batch has reached has both in closed form.

        Raises:
            [`~errors.CalibrationError`]: what was summed is not finite.
        """
        counts = self._P.real.new_tensor([float(self._rows), float(self._passes_without_loss)])
        flat = torch.cat([*(torch.view_as_real(sums).flatten() for sums in (self._P, self._Q)), counts])
        P, Q, counts = sum_over_processes(flat).split([2 * self._P.numel(), 2 * self._Q.numel(), 2])
        rows, without_loss = counts.tolist()
        if not rows:
            return ClosedFormGramians(self._system)
        P, Q = (torch.view_as_complex(sums.reshape(*self._P.shape, 2)) / rows for sums in (P, Q))
        if not (torch.isfinite(torch.view_as_real(P)).all() and torch.isfinite(torch.view_as_real(Q)).all()):
            raise CalibrationError(
                f"the Gramians of {layer_name} are not finite; its states or the loss gradient overflow on the "
                "calibration batches. Check the loss, or lower the learning rate."
            )
        return WeightedGramians(self._system, P, None if without_loss else Q)
