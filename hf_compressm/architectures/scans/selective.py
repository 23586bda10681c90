"""What replaces the scan of Mamba and its relatives (one diagonal A a channel)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import plain_eager_call, selective_scan
from ...ops.selective_gramians import adjoint_gramian, state_gramian
from ...systems.lti import DiagonalLTI
from .convolution import register_convolution
from .inputs import ChannelScans, ScanInputs, TimeAverages, _sums
from .switch import current_observer, fast_cpu_scan_enabled, is_packed, register_scan, warn_of_packing


def register_selective_scan(module_name: str) -> None:
    """
    Make known that a module's global names hold the scan of Mamba, by transformers' names or by mamba-ssm's, and the
    convolution in front of it.

    Args:
        module_name (`str`): The module that the family's forward pass is written in.
    """
    register_scan(
        module_name,
        {
            "mamba_selective_scan": selective_scan_replacement,
            "selective_scan_fn": selective_scan_replacement,
            "mamba_inner_fn": inner_function_replacement,
        },
    )
    register_convolution(module_name)


def selective_scan_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What replaces `mamba_selective_scan` (transformers) or `selective_scan_fn` (mamba-ssm)."""

    @functools.wraps(stock)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        observer = current_observer()
        fast = _fused_scan_applies(hidden_states, dt, A, B, C, D, z, delta_bias, **kwargs)
        if observer is None and not fast:
            return stock(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        if observer is None:
            output, state = selective_scan(
                hidden_states.mT, dt.mT, A, B.mT, C.mT, D=D, z=z if z is None else z.mT, delta_bias=delta_bias,
                delta_softplus=delta_softplus,
            )  # fmt: skip
            return (output.mT, state) if return_last_state else output.mT
        # An observer sees what the recurrence itself gets and gives.
        delta = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        delta = F.softplus(delta) if delta_softplus else delta
        inputs = SelectiveScanInputs(hidden_states.mT, delta.mT, A, B.mT, C.mT)
        if fast:
            output, state = selective_scan(inputs.u, inputs.delta, A, inputs.B, inputs.C)
        else:
            # A kernel refuses time steps that autocast has widened in the softplus.
            output, state = stock(
                hidden_states, dt, A, B, C, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=True, **kwargs,
            )  # fmt: skip
            output = output.mT
        if is_packed(**kwargs):
            warn_of_packing()
        output = observer.observe(inputs, output).mT
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        if z is not None:
            output = output * F.silu(z)
        return (output, state) if return_last_state else output

    return scan


def _fused_scan_applies(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | None, **kwargs: Any
) -> bool:
    given = [tensor for tensor in others if tensor is not None]
    if not fast_cpu_scan_enabled() or not plain_eager_call(hidden_states, dt, A, B, C, *given):
        return False
    if hidden_states.device.type != "cpu" or A.is_complex() or B.ndim != 3 or C.ndim != 3:
        return False
    # Packed sequences reset the state at their borders, which the fused scan does not do.
    return not is_packed(**kwargs)


def inner_function_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What replaces `mamba_inner_fn`: None, transformers' own sign to go on through the scan."""

    @functools.wraps(stock)
    def inner(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            ours = fast_cpu_scan_enabled() and projected_states.device.type == "cpu"
            if ours or current_observer() is not None:
                return None
        return stock(projected_states, *args, **kwargs)

    return inner


@dataclass(frozen=True)
class SelectiveScanInputs(TimeAverages, ScanInputs):
    r"""
    The scan of Mamba, \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t \\), with an A and a time step a channel.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input of the recurrence.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Positive time steps, after softplus and limits.
        A (`torch.Tensor` of shape `(channels, N)`): Negative decay rates.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout.
        part (`int`, *optional*): Which of a layer's scans it is.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    part: int | None = None

    @property
    def rows(self) -> int:
        """Sequences times steps times channels."""
        return self.u.numel()

    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """P, `(N, N)`, and the readout energy, `(N,)`."""
        return state_gramian(self.u, self.delta, self.A, self.B, self.C, times=times)

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """Q, `(N, N)`."""
        return adjoint_gramian(self.delta, self.A, self.C, grad_output, times=times)

    def channel_scans(self, channels: Tensor, output: Tensor) -> list[ChannelScans]:
        """One entry."""
        u, delta, output = (tensor[..., channels] for tensor in (self.u, self.delta, output))
        return [ChannelScans(u, delta, self.A[channels], self.B, self.C, output)]

    def sums(self) -> Tensor:
        """Of `delta` a channel, and of `B` and `C` a state."""
        return _sums(self.delta, self.B, self.C)

    def averaged_systems(self) -> Callable[[Tensor], DiagonalLTI]:
        """One system a channel, `(channels,)`."""
        A = self.A.detach().double()

        def systems(means: Tensor) -> DiagonalLTI:
            channels, n_states = A.shape
            delta, B, C = means.split([channels, n_states, n_states])
            delta = delta[:, None]
            return DiagonalLTI(torch.exp(delta * A), (delta * B)[..., None], C.expand(channels, 1, n_states))

        return systems
