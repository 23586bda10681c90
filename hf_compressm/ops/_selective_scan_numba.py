r"""
The kernels behind [`~ops.selective_scan`]: the recurrence forward in time, and its adjoint backward in time.

Both work through a range of sequences and of channel blocks, so that any number of threads can share a call; every
output that more than one such unit adds to has an axis for the unit. Arrays, all C-contiguous and of one float type
(float32 or float64), with `W = CHANNEL_BLOCK`:

- `u`, `delta`, `y` and gradients of them: (batch, length, channels); `B`, `C`: (batch, length, N);
- states: (batch, channels, N);
- `A_blocks`: (blocks, N, W), \\( A \log_2 e \\) of W channels side by side, zero where channels run out. Such empty
  lanes are computed and never written: with time step 0 and input 0 their state stays 0;
- `boundaries`: (batch, chunks, blocks, N, W), the state before each [`TIME_CHUNK`] steps.
"""

from __future__ import annotations

import numpy as np

from ._lanes import flush_subnormals, load_lanes, load_state, store_lanes, store_state
from ._numba import CHANNEL_BLOCK, LN_2, TIME_CHUNK, exp2, kernel, part


# Planes of the row of lanes that stands for one time step. In both passes:
_DELTA, _DRIVE = 0, 1
# in the forward pass only:
_OUTPUT = 2
# in the backward pass only:
_U, _GRAD_Y, _GRAD_DRIVE, _GRAD_DELTA = 2, 3, 4, 5
# Planes of the backward pass's row for the state in hand, and of its row for one time step of that state: the state
# before the step, and its decay in the step.
_A, _ADJOINT, _GRAD_A = 0, 1, 2
_BEFORE, _DECAY = 0, 1


@kernel
def scan_forward(u, delta, A_blocks, B, C, initial_state, y, final_state, boundaries, sequences, blocks):
    r"""
    \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = C_t^\top h_t \\), for a range of sequences and of blocks.

    `boundaries` may have no chunks: then none is kept.
    """
    length, n_states = u.shape[1], B.shape[2]
    state = np.empty((n_states, CHANNEL_BLOCK), u.dtype)
    row = np.empty((3, CHANNEL_BLOCK), u.dtype)
    for b in range(sequences[0], sequences[1]):
        for block in range(blocks[0], blocks[1]):
            first_channel = block * CHANNEL_BLOCK
            load_state(initial_state[b], first_channel, state)
            for t in range(length):
                if t % TIME_CHUNK == 0:
                    flush_subnormals(state)
                    if boundaries.shape[1] > 0:
                        boundaries[b, t // TIME_CHUNK, block] = state
                load_lanes(delta, b, t, first_channel, row, _DELTA)
                load_lanes(u, b, t, first_channel, row, _DRIVE)
                for lane in range(CHANNEL_BLOCK):
                    row[_DRIVE, lane] *= row[_DELTA, lane]
                    row[_OUTPUT, lane] = 0.0
                for n in range(n_states):
                    b_n, c_n = B[b, t, n], C[b, t, n]
                    for lane in range(CHANNEL_BLOCK):
                        decay = exp2(row[_DELTA, lane] * A_blocks[block, n, lane])
                        h = decay * state[n, lane] + row[_DRIVE, lane] * b_n
                        state[n, lane] = h
                        row[_OUTPUT, lane] += h * c_n
                store_lanes(row, _OUTPUT, y, b, t, first_channel)
            store_state(state, final_state[b], first_channel)


@part
def _load_chunk(u, delta, grad_y, b, start, steps, first_channel, step):
    for t in range(steps):
        load_lanes(delta, b, start + t, first_channel, step[t], _DELTA)
        load_lanes(u, b, start + t, first_channel, step[t], _U)
        load_lanes(grad_y, b, start + t, first_channel, step[t], _GRAD_Y)
        for lane in range(CHANNEL_BLOCK):
            step[t, _DRIVE, lane] = step[t, _DELTA, lane] * step[t, _U, lane]
            step[t, _GRAD_DRIVE, lane] = 0.0
            step[t, _GRAD_DELTA, lane] = 0.0


@part
def _recompute_state(B, b, n, start, steps, step, state, history):
    """Run one state through a chunk again, keeping its values and its decays."""
    for t in range(steps):
        b_n = B[b, start + t, n]
        for lane in range(CHANNEL_BLOCK):
            decay = exp2(step[t, _DELTA, lane] * state[_A, lane])
            history[t, _DECAY, lane] = decay
            history[t + 1, _BEFORE, lane] = decay * history[t, _BEFORE, lane] + step[t, _DRIVE, lane] * b_n


@part
def _run_adjoint(B, C, b, n, start, steps, step, state, history, grad_B, grad_C):
    r"""
    \\( g_t = C_t \bar y_t + e^{\Delta_{t+1} A} g_{t+1} \\) for one state, and what all factors receive from it.

    Before and after, the adjoint in `state` is that of the state before the next step: the decay is already in it.
    """
    for t in range(steps - 1, -1, -1):
        b_n, c_n = B[b, start + t, n], C[b, start + t, n]
        grad_b = grad_c = step.dtype.type(0)
        for lane in range(CHANNEL_BLOCK):
            grad_y = step[t, _GRAD_Y, lane]
            adjoint = state[_ADJOINT, lane] + c_n * grad_y
            grad_b += adjoint * step[t, _DRIVE, lane]
            grad_c += grad_y * history[t + 1, _BEFORE, lane]
            step[t, _GRAD_DRIVE, lane] += adjoint * b_n
            adjoint *= history[t, _DECAY, lane]
            state[_ADJOINT, lane] = adjoint
            grad_exponent = adjoint * history[t, _BEFORE, lane]
            step[t, _GRAD_DELTA, lane] += grad_exponent * state[_A, lane]
            state[_GRAD_A, lane] += grad_exponent * step[t, _DELTA, lane]
        grad_B[b, start + t, n] += grad_b
        grad_C[b, start + t, n] += grad_c


@part
def _store_chunk(step, b, start, steps, first_channel, grad_u, grad_delta):
    for t in range(steps):
        for lane in range(CHANNEL_BLOCK):
            grad_drive = step[t, _GRAD_DRIVE, lane]
            # A_blocks holds A times log2(e).
            step[t, _GRAD_DELTA, lane] = step[t, _GRAD_DELTA, lane] * LN_2 + grad_drive * step[t, _U, lane]
            step[t, _GRAD_DRIVE, lane] = grad_drive * step[t, _DELTA, lane]
        store_lanes(step[t], _GRAD_DRIVE, grad_u, b, start + t, first_channel)
        store_lanes(step[t], _GRAD_DELTA, grad_delta, b, start + t, first_channel)


@kernel
def scan_backward(
    u, delta, A_blocks, B, C, boundaries, grad_y, grad_final_state,
    grad_u, grad_delta, grad_A_blocks, grad_B, grad_C, grad_initial_state, sequences, blocks,
):  # fmt: skip
    """
    The gradient of [`scan_forward`], chunk by chunk from the end, one state after the other.

    Added to: `grad_A_blocks` (blocks, N, W), float64 and with respect to A itself, and `grad_B`, `grad_C`
    (batch, length, N). They belong to this unit alone.
    """
    length, n_states = u.shape[1], B.shape[2]
    adjoint = np.empty((n_states, CHANNEL_BLOCK), u.dtype)
    step = np.empty((TIME_CHUNK, 6, CHANNEL_BLOCK), u.dtype)
    state = np.empty((3, CHANNEL_BLOCK), u.dtype)
    history = np.empty((TIME_CHUNK + 1, 2, CHANNEL_BLOCK), u.dtype)
    for b in range(sequences[0], sequences[1]):
        for block in range(blocks[0], blocks[1]):
            first_channel = block * CHANNEL_BLOCK
            load_state(grad_final_state[b], first_channel, adjoint)
            for chunk in range(boundaries.shape[1] - 1, -1, -1):
                start = chunk * TIME_CHUNK
                steps = min(TIME_CHUNK, length - start)
                flush_subnormals(adjoint)
                _load_chunk(u, delta, grad_y, b, start, steps, first_channel, step)
                for n in range(n_states):
                    for lane in range(CHANNEL_BLOCK):
                        state[_A, lane] = A_blocks[block, n, lane]
                        state[_ADJOINT, lane] = adjoint[n, lane]
                        state[_GRAD_A, lane] = 0.0
                        history[0, _BEFORE, lane] = boundaries[b, chunk, block, n, lane]
                    _recompute_state(B, b, n, start, steps, step, state, history)
                    _run_adjoint(B, C, b, n, start, steps, step, state, history, grad_B, grad_C)
                    for lane in range(CHANNEL_BLOCK):
                        adjoint[n, lane] = state[_ADJOINT, lane]
                        grad_A_blocks[block, n, lane] += state[_GRAD_A, lane]
                _store_chunk(step, b, start, steps, first_channel, grad_u, grad_delta)
            store_state(adjoint, grad_initial_state[b], first_channel)
