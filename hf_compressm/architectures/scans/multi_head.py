"""What replaces the scan of Mamba-2 and its relatives (one decay a head)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import multi_head_scan, plain_eager_call
from ...ops.multi_head_gramians import multi_head_adjoint_gramian, multi_head_state_gramian
from ...systems.lti import DiagonalLTI
from .convolution import register_convolution
from .inputs import ChannelScans, ScanInputs, TimeAverages, _sums
from .switch import current_observer, fast_cpu_scan_enabled, is_packed, register_scan, warn_of_packing


def register_chunk_scan(module_name: str) -> None:
    """
    Make known that a module's global names hold the scan of Mamba-2, by transformers' names or by mamba-ssm's, and the
    convolution in front of it.

    Args:
        module_name (`str`): The module that the family's forward pass is written in.
    """
    register_scan(
        module_name,
        {
            "mamba2_chunk_scan": chunk_scan_replacement,
            "mamba_chunk_scan_combined": chunk_scan_replacement,
            "mamba2_split_conv1d_scan_combined": fused_function_replacement,
        },
    )
    register_convolution(module_name)


def chunk_scan_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """
    What replaces `mamba2_chunk_scan` (transformers) or `mamba_chunk_scan_combined` (mamba-ssm).

    A call that is observed, or made fast, is made with the final time steps and without skip and gate, so that an
    observer sees the scan's own output; both are added afterwards.
    """

    @functools.wraps(stock)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        observer = current_observer()
        fast = _fast_scan_applies(hidden_states, dt, A, B, C, **kwargs)
        if observer is None and not fast:
            return stock(
                hidden_states, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
                dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states, **kwargs,
            )  # fmt: skip
        delta = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        delta = F.softplus(delta) if dt_softplus else delta
        delta = delta.clamp(*dt_limit)
        inputs = MultiHeadScanInputs(hidden_states, delta, A, B, C)
        if fast:
            output, *state = multi_head_scan(hidden_states, delta, A, B, C, initial_states)
        else:
            settings = {"initial_states": initial_states, "return_final_states": return_final_states}
            result = stock(hidden_states, delta, A, B, C, chunk_size, **settings, **kwargs)
            output, *state = result if return_final_states else (result,)
        if observer is not None:
            if is_packed(**kwargs):
                warn_of_packing()
            output = observer.observe(inputs, output)
        if D is not None:
            output = output + hidden_states.to(output.dtype) * (D if D.ndim == 2 else D[:, None])
        if z is not None:
            output = output * F.silu(z)
        return (output, *state) if return_final_states else output

    return scan


def _fast_scan_applies(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> bool:
    if not fast_cpu_scan_enabled() or not plain_eager_call(hidden_states, dt, A, B, C):
        return False
    # Packed sequences reset the state at their borders, which the fast scan does not do.
    return hidden_states.device.type == "cpu" and not is_packed(**kwargs)


def fused_function_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What replaces `mamba2_split_conv1d_scan_combined`: None, the sign to go on through the scan."""

    @functools.wraps(stock)
    def fused(*args: Any, **kwargs: Any) -> Tensor | None:
        if current_observer() is not None:
            return None
        return stock(*args, **kwargs)

    return fused


@dataclass(frozen=True)
class MultiHeadScanInputs(TimeAverages, ScanInputs):
    r"""
    The scan of Mamba-2, \\( H_t = e^{\Delta_t A} H_{t-1} + \Delta_t u_t B_t^\top \\): every head has one decay and one
    time step, consecutive heads share the B and C of a group.

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Input of the recurrence.
        delta (`torch.Tensor` of shape `(batch, length, heads)`): Positive time steps, after softplus and limits.
        A (`torch.Tensor` of shape `(heads,)`): Negative decay rates.
        B (`torch.Tensor` of shape `(batch, length, groups, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): Readout.
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
        """Sequences times steps times the channels of a group."""
        return self.u.numel() // self.B.shape[2]

    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """P, `(groups, N, N)`, and the readout energy, `(groups, N)`."""
        return multi_head_state_gramian(self.u, self.delta, self.A, self.B, self.C, times=times)

    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """Q, `(groups, N, N)`."""
        return multi_head_adjoint_gramian(self.delta, self.A, self.C, grad_output, times=times)

    def channel_scans(self, channels: Tensor, output: Tensor) -> list[ChannelScans]:
        """An entry for each group, whose channels are those of its heads, one head after the other."""
        heads = channels // self.u.shape[-1]
        by_group = [tensor.unflatten(2, (self.B.shape[2], -1)) for tensor in (self.u, self.delta, output)]
        decays = self.A.unflatten(0, (self.B.shape[2], -1))
        scans = []
        for group, A in enumerate(decays):
            u, delta, y = (tensor[:, :, group] for tensor in by_group)
            A = A[heads].unsqueeze(-1).expand(-1, self.state_size)
            u, y = (tensor.flatten(2)[..., channels] for tensor in (u, y))
            scans.append(ChannelScans(u, delta[..., heads], A, self.B[:, :, group], self.C[:, :, group], y))
        return scans

    def sums(self) -> Tensor:
        """Of `delta` a head, and of `B` and `C` a state of each group."""
        return _sums(self.delta, self.B.flatten(2), self.C.flatten(2))

    def averaged_systems(self) -> Callable[[Tensor], DiagonalLTI]:
        """One system a head, `(groups, heads of a group)`; all its states have one pole."""
        A, groups = self.A.detach().double(), self.B.shape[2]
        n_states = self.state_size

        def systems(means: Tensor) -> DiagonalLTI:
            delta, B, C = means.split([len(A), groups * n_states, groups * n_states])
            delta = delta.reshape(groups, -1, 1)
            lam = torch.exp(delta * A.reshape(groups, -1, 1)).expand(-1, -1, n_states)
            B, C = (M.reshape(groups, 1, n_states) for M in (B, C))
            return DiagonalLTI(lam, (delta * B)[..., None], C.expand_as(lam)[..., None, :])

        return systems
