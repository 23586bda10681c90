r"""
The selective scan of Mamba, readable and fast.

\\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = C_t^\top h_t \\), for every channel with its own
\\( \Delta \\) and its own diagonal \\( A \\); B and C are shared by all channels. The skip connection D and the gate
belong to the caller.

Source: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752). As in
its CUDA implementation, no state is stored but a few: the backward pass computes the others again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..errors import ConfigurationError
from ._derivatives import is_transformed, needs_graph, plain_gradients
from ._numba import CHANNEL_BLOCK, LOG2_E, TIME_CHUNK
from ._selective_scan_numba import scan_backward, scan_forward
from ._threads import run_units, split_range
from ._validation import compute_dtype, require_shapes


def selective_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    The selective scan as a loop over time, on any device and differentiable any number of times.

    Autograd keeps every state. The arguments `u`, `delta`, `A`, `B`, `C` and `initial_state`, the results and the
    errors are those of [`selective_scan`].
    """
    _require_valid(u, delta, A, B, C, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    y_dtype = u.dtype
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    state = zero_state(u, A) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else u
    return y.to(y_dtype), state


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    The selective scan as a fused CPU kernel with its own backward pass.

    \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = C_t^\top h_t \\). Time grows in proportion to N. For the
    backward pass one state in 64 is kept, `batch * length / 64 * channels * N` numbers; without gradients none is.
    float64 arguments are computed in float64, everything else in float32, and each gradient has the dtype of its
    argument. The result does not depend on the number of threads; the last bits of the gradients of A, B and C do.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, not negative: after the softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Diagonal of each channel's state matrix, negative.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout of each step.
        initial_state (`torch.Tensor` of shape `(batch, channels, N)`, *optional*): State before the first step; zero
            when unset.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y, `(batch, length, channels)`, in the dtype of `u`, and the state after
        the last step, `(batch, channels, N)`, in float32 or float64. Both have derivatives of every kind and order;
        those that the kernel does not know are computed through [`selective_scan_reference`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, or not floating-point.
    """
    _require_valid(u, delta, A, B, C, initial_state)
    if u.device.type != "cpu":
        raise ConfigurationError(
            f"`selective_scan` runs on the CPU and its arguments are on {u.device}. Use mamba_ssm's kernels there, or "
            "`selective_scan_reference`."
        )
    if is_transformed():
        return selective_scan_reference(u, delta, A, B, C, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    y_dtype = u.dtype
    initial_state = zero_state(u, A) if initial_state is None else initial_state
    # Conversions happen outside of the function below, so that autograd undoes them.
    arguments = [tensor.to(dtype).contiguous() for tensor in (u, delta, A, B, C, initial_state)]
    y, final_state = _SelectiveScan.apply(torch.is_grad_enabled(), *arguments)
    return y.to(y_dtype), final_state


class _SelectiveScan(Function):
    """[`selective_scan`] on contiguous tensors of one dtype."""

    @staticmethod
    def forward(ctx, grad_enabled, u, delta, A, B, C, initial_state):
        keep = grad_enabled and any(ctx.needs_input_grad)
        A_blocks = channels_to_blocks(A * LOG2_E)
        n_blocks = A_blocks.shape[0]
        n_chunks = -(-u.shape[1] // TIME_CHUNK) if keep else 0
        y, final_state = torch.empty_like(u), torch.empty_like(initial_state)
        boundaries = u.new_empty(u.shape[0], n_chunks, *A_blocks.shape)
        arrays = _arrays(u, delta, A_blocks, B, C, initial_state, y, final_state, boundaries)
        sequence_ranges, block_ranges = divide_work(u.shape[0], n_blocks)
        run_units(scan_forward, [(*arrays, s, k) for s in sequence_ranges for k in block_ranges])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, delta, A, B, C, initial_state, boundaries)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        *arguments, boundaries = ctx.saved_tensors
        if needs_graph(grad_y, grad_final_state):
            return None, *plain_gradients(selective_scan_reference, arguments, (grad_y, grad_final_state))
        return None, *_fused_gradients(*arguments[:5], boundaries, grad_y, grad_final_state)


def _fused_gradients(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    boundaries: Tensor,
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C and the initial state by the kernel."""
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y.contiguous()
    grad_final_state = zero_state(u, A) if grad_final_state is None else grad_final_state.contiguous()
    A_blocks = channels_to_blocks(A * LOG2_E)
    sequence_ranges, block_ranges = divide_work(u.shape[0], A_blocks.shape[0])
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
    grad_initial_state = torch.empty_like(grad_final_state)
    # A gradient that several units contribute to has one copy for each.
    grad_A_blocks = A.new_zeros(len(sequence_ranges), *A_blocks.shape, dtype=torch.float64)
    grad_B, grad_C = (B.new_zeros(len(block_ranges), *B.shape) for _ in range(2))
    inputs = _arrays(u, delta, A_blocks, B, C, boundaries, grad_y, grad_final_state)
    units = []
    for i, sequences in enumerate(sequence_ranges):
        for j, blocks in enumerate(block_ranges):
            outputs = (grad_u, grad_delta, grad_A_blocks[i], grad_B[j], grad_C[j], grad_initial_state)
            units.append((*inputs, *_arrays(*outputs), sequences, blocks))
    run_units(scan_backward, units)
    grad_A = blocks_to_channels(grad_A_blocks.sum(0), A.shape[0]).to(A.dtype)
    grad_B, grad_C = (grad[0] if grad.shape[0] == 1 else grad.sum(0) for grad in (grad_B, grad_C))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_initial_state


def divide_work(batch: int, n_blocks: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of sequences and of channel blocks; every pair of them is one unit of a kernel's work."""
    # Twice as many units as threads even out what other programs take from one core.
    n_units = 1 if torch.get_num_threads() == 1 else 2 * torch.get_num_threads()
    sequence_ranges = split_range(batch, n_units)
    return sequence_ranges, split_range(n_blocks, -(-n_units // max(1, len(sequence_ranges))))


def channels_to_blocks(A: Tensor) -> Tensor:
    """(channels, N) to (blocks, N, CHANNEL_BLOCK), channels filled up with zeros."""
    n_blocks = -(-A.shape[0] // CHANNEL_BLOCK)
    padded = F.pad(A, (0, 0, 0, n_blocks * CHANNEL_BLOCK - A.shape[0]))
    return padded.view(n_blocks, CHANNEL_BLOCK, A.shape[1]).transpose(1, 2).contiguous()


def blocks_to_channels(A_blocks: Tensor, channels: int) -> Tensor:
    """The inverse of [`channels_to_blocks`]."""
    return A_blocks.transpose(1, 2).flatten(0, 1)[:channels]


def _arrays(*tensors: Tensor) -> list:
    return [tensor.detach().numpy() for tensor in tensors]


def zero_state(u: Tensor, A: Tensor) -> Tensor:
    """(batch, channels, N) zeros in the dtype that a scan of `u` with `A` computes in."""
    return torch.zeros(u.shape[0], *A.shape, dtype=compute_dtype(u, A), device=u.device)


def _require_valid(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    steps, inputs = ("batch", "length", "channels"), ("batch", "length", "N")
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "channels", "N"))}
    require_shapes(u=(u, steps), delta=(delta, steps), A=(A, ("channels", "N")), B=(B, inputs), C=(C, inputs), **states)
