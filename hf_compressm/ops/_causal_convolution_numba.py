r"""
The kernels behind [`~ops.causal_convolution`]: a filter of a few taps along time, a channel each, and its SiLU.

Both go through whole steps, all channels of a range next to each other: what is read lies one behind the other, and
the few steps that a filter sees stay in the nearest cache. Arrays, of one float type (float32 or float64):

- `u`, `grad_out`: rows of (batch, length, channels), see `_strided`;
- `taps`: (blocks, K + 1, W), the K taps of W channels side by side, the one of the present step last, and the bias;
  zero where channels run out;
- `out`, `grad_u`: (batch, length, channels), C-contiguous.
"""

from __future__ import annotations

import numpy as np

from ._activations_numba import logistic
from ._lanes import load_row, store_lanes
from ._numba import CHANNEL_BLOCK, TIME_CHUNK, kernel, part

# Planes of the row of lanes.
_U, _FILTERED, _GRAD = 0, 1, 2


@part
def _filter_step(u, b, t, first_channel, width, taps, block, row):
    """What the filter gives at a step: the bias, and the taps times the last K inputs."""
    flat, by_sequence, by_step = u
    n_taps = taps.shape[1] - 1
    for lane in range(CHANNEL_BLOCK):
        row[_FILTERED, lane] = taps[block, n_taps, lane]
    for k in range(max(0, n_taps - 1 - t), n_taps):
        load_row(flat, b * by_sequence + (t - n_taps + 1 + k) * by_step + first_channel, width, row, _U)
        for lane in range(CHANNEL_BLOCK):
            row[_FILTERED, lane] += taps[block, k, lane] * row[_U, lane]


@kernel
def convolution_forward(u, taps, silu, out, sequences, blocks):
    r"""
    \\( f_t = b + \sum_k w_k u_{t - K + 1 + k} \\), and \\( f_t \sigma(f_t) \\) with `silu`, for a range of sequences
    and of channel blocks.
    """
    row = np.empty((3, CHANNEL_BLOCK), out.dtype)
    for b in range(sequences[0], sequences[1]):
        for t in range(out.shape[1]):
            for block in range(blocks[0], blocks[1]):
                first_channel = block * CHANNEL_BLOCK
                _filter_step(u, b, t, first_channel, out.shape[2] - first_channel, taps, block, row)
                if silu:
                    for lane in range(CHANNEL_BLOCK):
                        row[_FILTERED, lane] *= logistic(row[_FILTERED, lane])
                store_lanes(row, _FILTERED, out, b, t, first_channel)


@part
def _load_gradient(u, grad_out, b, t, first_channel, width, taps, block, silu, row):
    """The gradient of what the filter gave at a step, which is computed again for it."""
    flat, by_sequence, by_step = grad_out
    load_row(flat, b * by_sequence + t * by_step + first_channel, width, row, _GRAD)
    if silu:
        _filter_step(u, b, t, first_channel, width, taps, block, row)
        for lane in range(CHANNEL_BLOCK):
            filtered = row[_FILTERED, lane]
            gate = logistic(filtered)
            row[_GRAD, lane] *= gate + filtered * (gate - gate * gate)


@part
def _add_to_taps(u, b, t, first_channel, width, block, row, sums):
    flat, by_sequence, by_step = u
    n_taps = sums.shape[1] - 1
    for lane in range(CHANNEL_BLOCK):
        sums[block, n_taps, lane] += row[_GRAD, lane]
    for k in range(max(0, n_taps - 1 - t), n_taps):
        load_row(flat, b * by_sequence + (t - n_taps + 1 + k) * by_step + first_channel, width, row, _U)
        for lane in range(CHANNEL_BLOCK):
            sums[block, k, lane] += row[_GRAD, lane] * row[_U, lane]


@kernel
def convolution_backward(u, taps, silu, grad_out, grad_u, grad_taps, sequences, blocks):
    """
    The gradient of [`convolution_forward`], from the last step to the first.

    Added to: `grad_taps` (blocks, K + 1, W), float64. It belongs to this unit alone.
    """
    length, n_taps = grad_u.shape[1], taps.shape[1] - 1
    row = np.empty((3, CHANNEL_BLOCK), grad_u.dtype)
    # The gradients of the K filtered steps that an input has a part in, step t in place t modulo K.
    later = np.empty((n_taps, taps.shape[0], CHANNEL_BLOCK), grad_u.dtype)
    sums = np.zeros(taps.shape, grad_u.dtype)
    for b in range(sequences[0], sequences[1]):
        later[:] = 0.0
        for t in range(length - 1, -1, -1):
            for block in range(blocks[0], blocks[1]):
                first_channel = block * CHANNEL_BLOCK
                width = grad_u.shape[2] - first_channel
                _load_gradient(u, grad_out, b, t, first_channel, width, taps, block, silu, row)
                _add_to_taps(u, b, t, first_channel, width, block, row, sums)
                for lane in range(CHANNEL_BLOCK):
                    later[t % n_taps, block, lane] = row[_GRAD, lane]
                    row[_GRAD, lane] = 0.0
                for k in range(n_taps):
                    place = (t + n_taps - 1 - k) % n_taps
                    for lane in range(CHANNEL_BLOCK):
                        row[_GRAD, lane] += taps[block, k, lane] * later[place, block, lane]
                store_lanes(row, _GRAD, grad_u, b, t, first_channel)
            if t % TIME_CHUNK == 0:
                # Long sums in single precision would lose digits.
                grad_taps[blocks[0] : blocks[1]] += sums[blocks[0] : blocks[1]]
                sums[:] = 0.0
