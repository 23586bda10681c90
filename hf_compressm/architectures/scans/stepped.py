"""Gramians of a recurrence that is given step by step, for families whose recurrence `ops` does not know."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from .inputs import ScanInputs


class SteppedScanInputs(ScanInputs):
    """
    The arguments of a scan that gives its states one after the other; adjoint states are their gradients.

    All states of a batch are held at once, in the dtype of the arguments. A family that is worth it gets faster ones in
    `ops`, and tests hold them against these.
    """

    @abstractmethod
    def states(self) -> Sequence[Tensor]:
        """The state after each step, a differentiable function of the one before; `(batch, groups, channels, N)`."""

    @abstractmethod
    def read(self, states: Tensor) -> Tensor:
        """
        The raw output of the scan.

        Args:
            states (`torch.Tensor` of shape `(batch, length, groups, channels, N)`): The states after all steps.
        """

    @property
    def rows(self) -> int:
        """Sequences times steps times the channels of a group."""
        return self.u.numel() // math.prod(self.B.shape[2:-1])

    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """P, `(groups, N, N)`, and the readout energy, `(groups, N)`."""
        with torch.no_grad():
            states = _sampled(torch.stack(list(self.states()), 1), times)
        read = _sampled(self.C.detach().reshape(*self.u.shape[:2], states.shape[2], -1), times)
        scale = self.u.shape[1] / times.shape[1]
        return scale * _outer(states), scale * torch.einsum("bkgcn,bkgn->gn", states.square(), read.square())

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """Q, `(groups, N, N)`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "part"}
        # So that the states are part of a graph.
        leaves = replace(self, **{name: tensor.detach().requires_grad_() for name, tensor in tensors.items()})
        with torch.enable_grad():
            states = list(leaves.states())
            output = leaves.read(torch.stack(states, 1))
            adjoints = torch.stack(torch.autograd.grad(output, states, grad_output.to(output.dtype)), 1)
        return self.u.shape[1] / times.shape[1] * _outer(_sampled(adjoints, times))


def _sampled(rows: Tensor, times: Tensor) -> Tensor:
    """Entries at some steps, (batch, K, ...) float64."""
    times = times.to(rows.device)
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(-1), times].double()


def _outer(states: Tensor) -> Tensor:
    return torch.einsum("bkgcn,bkgcm->gnm", states, states)
