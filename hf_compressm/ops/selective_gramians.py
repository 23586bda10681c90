r"""
Empirical Gramians of a selective layer, summed while the recurrence runs: no sequence of states is ever stored.

Channels are summed over, because they share B, C and the state's indices. Both Gramians are sums over data, so those
of several batches or processes are added.

Sources: the layer, Gu and Dao, 2023 (arXiv 2312.00752); Gramians from snapshots of adjoint states, Rowley, 2005,
"Model reduction for fluids, using balanced proper orthogonal decomposition"; with gradients of a nonlinear system,
Otto, Padovan and Rowley, 2022, "Model reduction for nonlinear systems by balanced truncation of state and gradient
covariance".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DimensionError
from ._state_kernels import implementation_for
from ._validation import compute_dtype, require_shapes, validated_times


@torch.no_grad()
def state_gramian(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    times: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Sums of \\( h h^\top \\) and of \\( (h_n C_n)^2 \\) over sequences, time and channels of a selective scan.

    The recurrence runs over every step in float32 (float64 for float64 arguments), on the CPU and on GPUs that Triton
    knows in a compiled kernel and elsewhere as a parallel scan; sampled states are widened to float64 before they are
    multiplied. Beyond copies of the arguments, peak memory is a few N x N matrices a thread and one state a sequence on
    the CPU, and about 350 MB elsewhere, whatever the length.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype and device.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, after the softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Diagonal of each channel's state matrix, negative.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix of each step.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout of each step.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): Steps of each sequence that enter the sums, in
            ascending order, as [`sample_times`] draws them; the sums are multiplied by length / K. All steps when
            unset.
        initial_state (`torch.Tensor` of shape `(batch, channels, N)`, *optional*): State before the first step.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: P, `(N, N)`, and the readout energy, `(N,)`; float64, on the device of `u`
        (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps, inputs = ("batch", "length", "channels"), ("batch", "length", "N")
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "channels", "N"))}
    sizes = require_shapes(
        u=(u, steps), delta=(delta, steps), A=(A, ("channels", "N")), B=(B, inputs), C=(C, inputs), **states
    )
    times = validated_times(times, sizes["batch"], sizes["length"])
    dtype = compute_dtype(u, delta, A, B)
    u, delta, A, B = (tensor.to(dtype) for tensor in (u, delta, A, B))
    P, readout_energy = _outer_products(delta, delta * u, A, B, times, initial_state, readout=C)
    scale = sizes["length"] / max(1, times.shape[1])
    return scale * P, scale * readout_energy


@torch.no_grad()
def adjoint_gramian(delta: Tensor, A: Tensor, C: Tensor, grad_y: Tensor, times: Tensor | None = None) -> Tensor:
    r"""
    Sum of \\( g g^\top \\) over sequences, time and channels, with the adjoint states of a selective scan.

    \\( g_t = C_t \bar y_t + e^{\Delta_{t+1} A} g_{t+1} \\) is the gradient with respect to \\( h_t \\) of any function
    whose gradient with respect to y is \\( \bar y \\). Precision and memory are those of [`state_gramian`].

    Args:
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, after the softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Diagonal of each channel's state matrix, negative.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout of each step.
        grad_y (`torch.Tensor` of shape `(batch, length, channels)`): Gradient with respect to y.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].

    Returns:
        `torch.Tensor`: Q, `(N, N)` float64, on the device of `delta` (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps = ("batch", "length", "channels")
    sizes = require_shapes(
        delta=(delta, steps), A=(A, ("channels", "N")), C=(C, ("batch", "length", "N")), grad_y=(grad_y, steps)
    )
    times = validated_times(times, sizes["batch"], sizes["length"])
    dtype = compute_dtype(delta, A, C, grad_y)
    delta, A, C, grad_y = (tensor.to(dtype) for tensor in (delta, A, C, grad_y))
    # In reversed time the adjoint is a state whose decay is that of the step it has just come back through.
    next_delta = torch.cat([delta[:, 1:], torch.zeros_like(delta[:, :1])], dim=1)
    reversed_times = sizes["length"] - 1 - times.flip(1)
    Q, _ = _outer_products(next_delta.flip(1), grad_y.flip(1), A, C.flip(1), reversed_times)
    return sizes["length"] / max(1, times.shape[1]) * Q


def sample_times(batch: int, length: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """
    Random time steps for each sequence: one in every one of `count` equal windows of the sequence.

    Every step has the same chance to be drawn, so sums over sampled steps times `length / count` are unbiased. A
    regular stride would not see what happens between its steps in periodic data, such as the rows of an image. Windows
    that share a step, where `count` does not divide `length`, may both draw it.

    Args:
        batch (`int`): Number of sequences.
        length (`int`): Number of time steps, at least 1.
        count (`int`): Number of steps to draw from each sequence, from 1 to `length`.
        generator (`torch.Generator`, *optional*): Source of randomness; torch's own when unset.

    Returns:
        `torch.Tensor` of shape `(batch, count)`, int64: Ascending steps, on the generator's device.

    Raises:
        [`~errors.DimensionError`]: `count` is not from 1 to `length`.
    """
    if not 1 <= count <= length:
        raise DimensionError(f"`count` is {count}; it must be from 1 to the sequence length, {length}.")
    device = "cpu" if generator is None else generator.device
    if count == length:
        return torch.arange(length, device=device).expand(batch, length).contiguous()
    offsets = torch.rand(batch, count, generator=generator, device=device, dtype=torch.float64)
    windows = torch.arange(count, device=device, dtype=torch.float64)
    return ((windows + offsets) * (length / count)).long().clamp_(max=length - 1)


def default_sample_count(length: int, state_size: int) -> int:
    """
    How many steps of a sequence to sample so that the Gramian costs about as much as the recurrence.

    The product takes `2 N^2` operations a sample and the recurrence some 30 N a step: one step in N / 8 balances them.

    Args:
        length (`int`): Number of time steps, at least 1.
        state_size (`int`): Number of states per channel, N.
    """
    return max(1, min(length, -(-8 * length // max(8, state_size))))


def _outer_products(delta: Tensor, *arguments: Tensor | None, **options: Tensor) -> tuple[Tensor, Tensor]:
    return implementation_for(delta.device).sampled_outer_products(delta, *arguments, **options)
