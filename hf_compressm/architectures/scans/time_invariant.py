"""What a time-invariant layer hands to its recurrence, and how it is watched: by its module's input and output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops import (
    default_sample_count,
    diagonal_adjoint_gramian,
    diagonal_state_gramian,
    sample_times,
    sampled_diagonal_states,
)
from ...systems import DiagonalLTI

if TYPE_CHECKING:
    from ..contract import ScanObserver


@dataclass(frozen=True)
class SystemInputs:
    """
    What a time-invariant layer sees in one forward pass.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H)`): Input of the recurrence, zero where there is padding.
        system ([`~systems.DiagonalLTI`]): The layer's system, or one for each channel.
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
        part (`None`): A time-invariant layer makes one scan a pass.
    """

    u: Tensor
    system: DiagonalLTI
    mask: Tensor | None = None
    part: None = None

    @property
    def rows(self) -> int:
        """How many states a Gramian of the pass is a sum over: the steps that are not padding."""
        return self.u.shape[0] * self.u.shape[1] if self.mask is None else int(self.mask.sum())

    def detached(self) -> SystemInputs:
        """The same without gradients."""
        return SystemInputs(self.u.detach(), self.system, self.mask)

    def sample_times(self, generator: torch.Generator) -> Tensor:
        """Random steps of each sequence, so many that their Gramian costs about as much as the recurrence."""
        batch, length = self.u.shape[:2]
        return sample_times(batch, length, default_sample_count(length, self.system.order), generator)

    def state_gramian(self, times: Tensor) -> Tensor:
        """The sum of the states' outer products, `(..., N, N)` complex128; see [`~ops.diagonal_state_gramian`]."""
        return diagonal_state_gramian(self.u, self.system.lam, self._input_matrix(), times, self.mask)

    def states(self, sequences: Tensor, times: Tensor) -> Tensor:
        """
        The states of some sequences at some steps of each.

        Args:
            sequences (`torch.Tensor` of shape `(sequences,)`, int64): Which.
            times (`torch.Tensor` of shape `(sequences, K)`, int64): Their steps, ascending.

        Returns:
            `torch.Tensor` of shape `(sequences, K, ..., N)`, complex128: The systems of channels before the states.
        """
        return sampled_diagonal_states(self.u[sequences], self.system.lam, self._input_matrix(), times)

    def _input_matrix(self) -> Tensor:
        return self.system.B.squeeze(-1) if self.system.batch_shape else self.system.B

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """The sum of the adjoint states' outer products; see [`~ops.diagonal_adjoint_gramian`]."""
        C = self.system.C.squeeze(-2) if self.system.batch_shape else self.system.C
        return diagonal_adjoint_gramian(self.system.lam, C, grad_output, times, self.mask)


@contextmanager
def watching_system(module: nn.Module, system: DiagonalLTI, observer: ScanObserver) -> Iterator[None]:
    """
    Show the forward passes of a time-invariant module to an observer while the context is open.

    Args:
        module (`torch.nn.Module`): Called with `hidden_states` `(batch, length, H)` and, where there is padding, with
            `mask` `(batch, length)`; returns the output, the feedthrough of each channel, `D`, in it.
        system ([`~systems.DiagonalLTI`]): The system that it computes.
        observer ([`~architectures.contract.ScanObserver`]): Is asked at each pass.
    """

    def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        arguments = dict(zip(("hidden_states", "mask"), args), **kwargs)
        u, mask = arguments["hidden_states"], arguments.get("mask")
        if mask is not None:
            u = u * mask.unsqueeze(-1).to(u.dtype)
        skip = u * module.D.to(u.dtype)
        return observer.observe(SystemInputs(u, system, mask), output - skip) + skip

    handle = module.register_forward_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
