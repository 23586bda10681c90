r"""
The selective scan of Mamba with what stands around it in a mixer, readable and fast.

\\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = C_t^\top h_t \\), for every channel with its own
\\( \Delta \\) and its own diagonal \\( A \\); B and C are shared by all channels. On request the time steps come out
of a softplus, the skip \\( D u_t \\) is added to the output, and the SiLU of a gate z multiplies it.

Source: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752). As in
its CUDA implementation, no state is stored but a few: the backward pass computes the others again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ._derivatives import is_transformed, needs_graph, plain_gradients
from ._numba import CHANNEL_BLOCK, LOG2_E, TIME_CHUNK
from ._selective_scan_numba import scan_backward, scan_forward
from ._strided import rows
from ._threads import run_units, split_range
from ._validation import compute_dtype, require_cpu, require_shapes

# A single step of fewer numbers is done before another thread has begun.
WORTH_SHARING = 2**16


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    The selective scan as a loop over time, on any device and differentiable any number of times.

    Autograd keeps every state. The arguments `u`, `delta`, `A`, `B`, `C`, `initial_state`, `D`, `z`, `delta_bias` and
    `delta_softplus`, the results and the errors are those of [`selective_scan`].
    """
    _require_valid(u, delta, A, B, C, initial_state, D, z, delta_bias)
    dtype, y_dtype = compute_dtype(u, delta, A, B, C), _output_dtype(u, D, z)
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + delta_bias.to(dtype)
    delta = F.softplus(delta) if delta_softplus else delta
    state = zero_state(u, A) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else u
    y = y if D is None else y + u * D.to(dtype)
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(y_dtype), state


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""
    The selective scan as a fused CPU kernel with its own backward pass.

    \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = C_t^\top h_t \\). Time grows in proportion to N. For the
    backward pass one state in 64 is kept, `batch * length / 64 * channels * N` numbers; without gradients none is.
    float64 arguments are computed in float64, everything else in float32, and each gradient has the dtype of its
    argument. The result does not depend on the number of threads; the last bits of the gradients of A, B, C, D and
    `delta_bias` do.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype. Like the other
            arguments of its shape it may be a part of a larger tensor; it is not copied as long as its channels lie
            next to each other.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, not negative after the softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Diagonal of each channel's state matrix, negative.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout of each step.
        initial_state (`torch.Tensor` of shape `(batch, channels, N)`, *optional*): State before the first step; zero
            when unset.
        D (`torch.Tensor` of shape `(channels,)`, *optional*): Skip connection: \\( D u_t \\) is added to the output.
        z (`torch.Tensor` of shape `(batch, length, channels)`, *optional*): Gate: its SiLU multiplies the output.
        delta_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to the time steps, before the softplus.
        delta_softplus (`bool`, *optional*, defaults to `False`): Whether the time steps are the softplus of `delta`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y, `(batch, length, channels)`, in the dtype that `u`, `D` and `z` have
        together, and the state after the last step, `(batch, channels, N)`, in float32 or float64. Both have
        derivatives of every kind and order; those that the kernel does not know are computed through
        [`selective_scan_reference`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, or not floating-point.
    """
    _require_valid(u, delta, A, B, C, initial_state, D, z, delta_bias)
    require_cpu("selective_scan", u, "mamba_ssm")
    if is_transformed():
        return selective_scan_reference(u, delta, A, B, C, initial_state, D, z, delta_bias, delta_softplus)
    dtype = compute_dtype(u, delta, A, B, C)
    initial_state = zero_state(u, A) if initial_state is None else initial_state
    # Conversions happen outside of the function below, so that autograd undoes them.
    arguments = (u, delta, A, B.contiguous(), C.contiguous(), initial_state.contiguous(), D, z, delta_bias)
    arguments = (tensor if tensor is None else tensor.to(dtype) for tensor in arguments)
    y, final_state = _SelectiveScan.apply(torch.is_grad_enabled(), delta_softplus, *arguments)
    return y.to(_output_dtype(u, D, z)), final_state


class _Inputs(NamedTuple):
    """The tensors of a call, of one dtype; B, C and the initial state contiguous."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None

    def arrays(self, softplus: bool) -> tuple:
        """What both kernels begin with."""
        A_blocks = channels_to_blocks(self.A.detach() * LOG2_E)
        per_channel = [
            self.u.new_zeros(self.u.shape[-1]) if x is None else x.detach() for x in (self.delta_bias, self.D)
        ]
        beside = channels_to_blocks(torch.stack(per_channel, dim=1))
        z = self.u.new_empty(0, 0, 0) if self.z is None else self.z
        B, C = _arrays(self.B, self.C)
        return rows(self.u), rows(self.delta), A_blocks.numpy(), B, C, beside.numpy(), rows(z), softplus


class _SelectiveScan(Function):
    """[`selective_scan`] on tensors of one dtype."""

    @staticmethod
    def forward(ctx, grad_enabled, softplus, *tensors):
        inputs = _Inputs(*tensors)
        u, initial_state = inputs.u, inputs.initial_state
        keep = grad_enabled and any(ctx.needs_input_grad)
        n_chunks = -(-u.shape[1] // TIME_CHUNK) if keep else 0
        arguments = inputs.arrays(softplus)
        y, final_state = u.new_empty(u.shape), torch.empty_like(initial_state)
        boundaries = u.new_empty(u.shape[0], n_chunks, *arguments[2].shape)
        arrays = (*arguments, *_arrays(initial_state, y, final_state, boundaries))
        sequence_ranges, block_ranges = divide_work(u.shape[0], boundaries.shape[2])
        run_units(scan_forward, [(*arrays, s, k) for s in sequence_ranges for k in block_ranges])
        ctx.set_materialize_grads(False)
        ctx.softplus = softplus
        ctx.save_for_backward(*tensors, boundaries)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        *tensors, boundaries = ctx.saved_tensors
        if needs_graph(grad_y, grad_final_state):
            return None, None, *_plain_gradients(tensors, ctx.softplus, (grad_y, grad_final_state))
        return None, None, *_fused_gradients(_Inputs(*tensors), ctx.softplus, boundaries, grad_y, grad_final_state)


def _plain_gradients(
    tensors: list[Tensor | None], softplus: bool, grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of all arguments by autograd; None for those that are not given."""
    given = [number for number, tensor in enumerate(tensors) if tensor is not None]

    def scan(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        found = dict(zip(given, arguments))
        return selective_scan_reference(*(found.get(i) for i in range(len(tensors))), delta_softplus=softplus)

    found = dict(zip(given, plain_gradients(scan, [tensors[i] for i in given], grads)))
    return [found.get(number) for number in range(len(tensors))]


def _fused_gradients(
    inputs: _Inputs, softplus: bool, boundaries: Tensor, grad_y: Tensor | None, grad_final_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments by the kernel."""
    u, A, B = inputs.u, inputs.A, inputs.B
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_final_state = zero_state(u, A) if grad_final_state is None else grad_final_state.contiguous()
    arguments = inputs.arrays(softplus)
    sequence_ranges, block_ranges = divide_work(u.shape[0], boundaries.shape[2])
    grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
    grad_z = u.new_empty((0, 0, 0) if inputs.z is None else u.shape)
    grad_initial_state = torch.empty_like(grad_final_state)
    # A gradient that several units contribute to has one copy for each.
    n_blocks, n_states, width = boundaries.shape[2:]
    grad_A_blocks = A.new_zeros(len(sequence_ranges), n_blocks, n_states, width, dtype=torch.float64)
    grad_beside = A.new_zeros(len(sequence_ranges), n_blocks, 2, width, dtype=torch.float64)
    grad_B, grad_C = (B.new_zeros(len(block_ranges), *B.shape) for _ in range(2))
    arrays = (*arguments, *_arrays(boundaries), rows(grad_y), *_arrays(grad_final_state))
    units = []
    for i, sequences in enumerate(sequence_ranges):
        for j, blocks in enumerate(block_ranges):
            outputs = (grad_u, grad_delta, grad_z, grad_A_blocks[i], grad_B[j], grad_C[j], grad_beside[i])
            units.append((*arrays, *_arrays(*outputs, grad_initial_state), sequences, blocks))
    run_units(scan_backward, units)
    grad_A, grad_both = (
        blocks_to_channels(grad.sum(0), A.shape[0]).to(A.dtype) for grad in (grad_A_blocks, grad_beside)
    )
    grad_B, grad_C = (grad[0] if grad.shape[0] == 1 else grad.sum(0) for grad in (grad_B, grad_C))
    optional = zip((inputs.D, inputs.z, inputs.delta_bias), (grad_both[:, 1], grad_z, grad_both[:, 0]))
    optional = [None if argument is None else grad for argument, grad in optional]
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_initial_state, *optional


def divide_work(batch: int, n_blocks: int, shared: bool = True) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """
    Ranges of sequences and of channel blocks; every pair of them is one unit of a kernel's work.

    Args:
        batch (`int`): Number of sequences.
        n_blocks (`int`): Number of channel blocks.
        shared (`bool`, *optional*, defaults to `True`): Whether there is enough to do for several threads.
    """
    # Twice as many units as threads even out what other programs take from one core.
    n_units = 2 * torch.get_num_threads() if shared and torch.get_num_threads() > 1 else 1
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


def as_arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    """Tensors as contiguous arrays of one dtype; where they are that already, their own memory."""
    return [tensor.detach().to(dtype).contiguous().numpy() for tensor in tensors]


def zero_state(u: Tensor, A: Tensor) -> Tensor:
    """(batch, channels, N) zeros in the dtype that a scan of `u` with `A` computes in."""
    return torch.zeros(u.shape[0], *A.shape, dtype=compute_dtype(u, A), device=u.device)


def _output_dtype(u: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = u.dtype
    for tensor in others:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _require_valid(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    steps, inputs = ("batch", "length", "channels"), ("batch", "length", "N")
    optional = {
        "initial_state": (initial_state, ("batch", "channels", "N")),
        "D": (D, ("channels",)),
        "z": (z, steps),
        "delta_bias": (delta_bias, ("channels",)),
    }
    optional = {name: (tensor, axes) for name, (tensor, axes) in optional.items() if tensor is not None}
    require_shapes(
        u=(u, steps), delta=(delta, steps), A=(A, ("channels", "N")), B=(B, inputs), C=(C, inputs), **optional
    )
