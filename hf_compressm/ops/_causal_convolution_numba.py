r"""
The kernels behind [`~ops.causal_convolution`]: a filter of a few taps along time, a channel each, and its SiLU.

Those for sequences go through whole steps, all channels of a range next to each other: what is read lies one behind the
other, and the few steps that a filter sees stay in the nearest cache. Arrays, of one float type (float32 or float64):

- `u`, `grad_out`: rows of (batch, length, channels), see `_strided`;
- `taps`: (blocks, K + 1, W), the K taps of W channels side by side, that of the present step last, and the bias; zero
  where channels run out;
- `out`, `grad_u`: (batch, length, channels), C-contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ._activations_numba import logistic
from ._numba import CHANNEL_BLOCK, TIME_CHUNK, kernel, part


class ConvolutionKernels(NamedTuple):
    """
    The kernels for one number of taps.

    Args:
        forward (`Callable`): The filter and its activation.
        backward (`Callable`): Their gradient.
        step (`Callable`): One step, from the inputs before it.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    step: Callable[..., None]


@functools.cache
def convolution_kernels(n_taps: int) -> ConvolutionKernels:
    """The kernels for filters of K taps: with K a constant the loop over taps becomes part of the one over lanes."""
    return ConvolutionKernels(_forward(n_taps), _backward(n_taps), _step(n_taps))


@part
def _filter_step(flat, here, by_step, t, taps, block, n_taps, n_lanes, filtered):
    """What the filter gives at a step: the bias, and the taps times the last K inputs; `here` is the last one."""
    first = here - (n_taps - 1) * by_step
    if t >= n_taps - 1:
        for lane in range(n_lanes):
            total = taps[block, n_taps, lane]
            for k in range(n_taps):
                total += taps[block, k, lane] * flat[np.uintp(first + k * by_step + lane)]
            filtered[lane] = total
    else:
        for lane in range(n_lanes):
            filtered[lane] = taps[block, n_taps, lane]
        for k in range(n_taps - 1 - t, n_taps):
            for lane in range(n_lanes):
                filtered[lane] += taps[block, k, lane] * flat[np.uintp(first + k * by_step + lane)]


@part
def _add_to_taps(flat, here, by_step, t, block, n_taps, n_lanes, work):
    """The gradients of the taps and the bias from one step, whose gradient is the first row of `work`."""
    first = here - (n_taps - 1) * by_step
    if t >= n_taps - 1:
        for lane in range(n_lanes):
            grad = work[block, 0, lane]
            work[block, 2 * n_taps, lane] += grad
            for k in range(n_taps):
                work[block, n_taps + k, lane] += grad * flat[np.uintp(first + k * by_step + lane)]
    else:
        for lane in range(n_lanes):
            work[block, 2 * n_taps, lane] += work[block, 0, lane]
        for k in range(n_taps - 1 - t, n_taps):
            for lane in range(n_lanes):
                grad = work[block, 0, lane]
                work[block, n_taps + k, lane] += grad * flat[np.uintp(first + k * by_step + lane)]


def _forward(n_taps: int) -> Callable[..., None]:
    @kernel
    def convolution_forward(u, taps, silu, out, sequences, blocks):
        """The filter and its activation, for a range of sequences and of channel blocks."""
        flat, by_sequence, by_step = u
        filtered = np.empty(CHANNEL_BLOCK, out.dtype)
        for b in range(sequences[0], sequences[1]):
            for t in range(out.shape[1]):
                for block in range(blocks[0], blocks[1]):
                    first_channel = block * CHANNEL_BLOCK
                    n_lanes = min(CHANNEL_BLOCK, out.shape[2] - first_channel)
                    here = b * by_sequence + t * by_step + first_channel
                    _filter_step(flat, here, by_step, t, taps, block, n_taps, n_lanes, filtered)
                    if silu:
                        for lane in range(n_lanes):
                            filtered[lane] *= logistic(filtered[lane])
                    for lane in range(n_lanes):
                        out[b, t, np.uintp(first_channel + lane)] = filtered[lane]

    return convolution_forward


def _backward(n_taps: int) -> Callable[..., None]:
    @kernel
    def convolution_backward(u, taps, silu, grad_out, grad_u, grad_taps, sequences, blocks):
        """
        The gradient of the filter and its activation, from the last step to the first.

        Added to: `grad_taps` (blocks, K + 1, W), float64. It belongs to this unit alone.
        """
        flat, by_sequence, by_step = u
        grad_flat, grad_by_sequence, grad_by_step = grad_out
        filtered = np.empty(CHANNEL_BLOCK, grad_u.dtype)
        # For each block: the gradients of the filtered step in hand and of the K - 1 after it, and the sums so far for
        # the K taps and the bias.
        work = np.zeros((taps.shape[0], 2 * n_taps + 1, CHANNEL_BLOCK), grad_u.dtype)
        for b in range(sequences[0], sequences[1]):
            work[:, :n_taps] = 0.0
            for t in range(grad_u.shape[1] - 1, -1, -1):
                for block in range(blocks[0], blocks[1]):
                    first_channel = block * CHANNEL_BLOCK
                    n_lanes = min(CHANNEL_BLOCK, grad_u.shape[2] - first_channel)
                    here = b * by_sequence + t * by_step + first_channel
                    grad_here = b * grad_by_sequence + t * grad_by_step + first_channel
                    for k in range(n_taps - 1, 0, -1):
                        for lane in range(n_lanes):
                            work[block, k, lane] = work[block, k - 1, lane]
                    for lane in range(n_lanes):
                        work[block, 0, lane] = grad_flat[np.uintp(grad_here + lane)]
                    if silu:
                        _filter_step(flat, here, by_step, t, taps, block, n_taps, n_lanes, filtered)
                        for lane in range(n_lanes):
                            gate = logistic(filtered[lane])
                            work[block, 0, lane] *= gate + filtered[lane] * (gate - gate * gate)
                    _add_to_taps(flat, here, by_step, t, block, n_taps, n_lanes, work)
                    for lane in range(n_lanes):
                        total = work[block, 0, lane] * taps[block, n_taps - 1, lane]
                        for k in range(1, n_taps):
                            total += work[block, k, lane] * taps[block, n_taps - 1 - k, lane]
                        grad_u[b, t, np.uintp(first_channel + lane)] = total
                if t % TIME_CHUNK == 0:
                    # Long sums in single precision would lose digits.
                    grad_taps[blocks[0] : blocks[1]] += work[blocks[0] : blocks[1], n_taps:]
                    work[:, n_taps:] = 0.0

    return convolution_backward


def _step(n_taps: int) -> Callable[..., None]:
    @kernel
    def convolution_step(state, u, weight, bias, silu, out, sequences, channels):
        """
        One step of the filter and its activation, for a range of sequences and of channels.

        All C-contiguous: `state` (batch, channels, K), the last K inputs, moved on by one; `u`, `out` (batch, 1,
        channels); `weight` (channels, K); `bias` (channels,).
        """
        for b in range(sequences[0], sequences[1]):
            for c in range(channels[0], channels[1]):
                channel = np.uintp(c)
                total = bias[channel]
                for k in range(n_taps):
                    newest = u[b, 0, channel] if k == n_taps - 1 else state[b, channel, np.uintp(k + 1)]
                    state[b, channel, np.uintp(k)] = newest
                    total += weight[channel, np.uintp(k)] * newest
                out[b, 0, channel] = total
            if silu:
                for c in range(channels[0], channels[1]):
                    channel = np.uintp(c)
                    out[b, 0, channel] *= logistic(out[b, 0, channel])

    return convolution_step
