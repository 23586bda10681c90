r"""
The kernel behind [`~ops.selective_step`]: one step of the recurrence, with what stands before and after it in a mixer.

One step leaves nothing to walk along but the states. Those of a channel lie next to each other, as in a cache, and the
innermost loop goes over them. Arrays, all C-contiguous and of one float type (float32 or float64):

- `state`: (batch, channels, N); `A`: (channels, N); `B`, `C`: (batch, 1, N);
- `u`, `delta`, `z`, `y`: (batch, 1, channels); `z` may be empty: then there is no gate. With `soft`, `delta` is what
  the softplus makes time steps of;
- `bias`, `D`: (channels,), zero where there is none.
"""

from __future__ import annotations

import numpy as np

from ._activations_numba import logistic, softplus
from ._numba import CHANNEL_BLOCK, LOG2_E, exp2, kernel, part

# Planes of the row of lanes that stands for the channels of a block: the time step times log2(e), what is added to a
# state for each unit of B, and the output.
_EXPONENT, _DRIVE, _OUTPUT = 0, 1, 2
# Planes of what all channels of a sequence share.
_B, _C = 0, 1


@part
def _advance(state, A, shared, exponent, drive):
    """Bring the states of a channel to the next step, and read them."""
    total = shared.dtype.type(0)
    for n in range(shared.shape[1]):
        h = exp2(exponent * A[n]) * state[n] + drive * shared[_B, n]
        state[n] = h
        total += h * shared[_C, n]
    return total


@kernel
def step_forward(state, u, delta, A, B, C, bias, D, z, soft, y, sequences, blocks):
    r"""
    \\( h \leftarrow e^{\Delta A} h + \Delta u B, y = (C^\top h + D u) z \sigma(z) \\), for a range of sequences and of
    channel blocks.
    """
    scale = y.dtype.type(LOG2_E)
    row = np.empty((3, CHANNEL_BLOCK), y.dtype)
    shared = np.empty((2, A.shape[1]), y.dtype)
    for b in range(sequences[0], sequences[1]):
        shared[_B], shared[_C] = B[b, 0], C[b, 0]
        for block in range(blocks[0], blocks[1]):
            first_channel = block * CHANNEL_BLOCK
            n_lanes = min(CHANNEL_BLOCK, A.shape[0] - first_channel)
            for lane in range(n_lanes):
                channel = np.uintp(first_channel + lane)
                step = delta[b, 0, channel] + bias[channel]
                step = softplus(step) if soft else step
                row[_EXPONENT, lane] = step * scale
                row[_DRIVE, lane] = step * u[b, 0, channel]
            for lane in range(n_lanes):
                channel = np.uintp(first_channel + lane)
                read = _advance(state[b, channel], A[channel], shared, row[_EXPONENT, lane], row[_DRIVE, lane])
                row[_OUTPUT, lane] = read
            for lane in range(n_lanes):
                channel = np.uintp(first_channel + lane)
                row[_OUTPUT, lane] += D[channel] * u[b, 0, channel]
            if z.size > 0:
                for lane in range(n_lanes):
                    gate = z[b, 0, np.uintp(first_channel + lane)]
                    row[_OUTPUT, lane] *= gate * logistic(gate)
            for lane in range(n_lanes):
                y[b, 0, np.uintp(first_channel + lane)] = row[_OUTPUT, lane]
