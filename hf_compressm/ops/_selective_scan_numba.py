r"""
The kernels behind [`~ops.selective_scan`]: the recurrence forward in time, and its adjoint backward in time, with what
stands before and after the recurrence in a mixer.

Both work through a range of sequences and of channel blocks, so that any number of threads can share a call; every
output that more than one such unit adds to has an axis for the unit. Arrays, of one float type (float32 or float64),
with `W = CHANNEL_BLOCK`:

- `u`, `delta`, `z`, `grad_y`: rows of (batch, length, channels), see `_strided`; `z` may be empty: then there is no
  gate. With `soft`, `delta` is what the softplus makes time steps of;
- the others are C-contiguous: `y` and gradients of rows (batch, length, channels); `B`, `C` (batch, length, N);
- states: (batch, channels, N);
- `A_blocks`: (blocks, N, W), \\( A \log_2 e \\) of W channels side by side, zero where channels run out. Such empty
  lanes are computed and never written: with input 0 their state stays 0;
- `beside`: (blocks, 2, W), the bias of the time steps and the skip D of each channel; zero where there is none;
- `boundaries`: (batch, chunks, blocks, N, W), the state before each [`TIME_CHUNK`] steps.
"""

from __future__ import annotations

import numpy as np

from ._activations_numba import logistic, softplus, softplus_slope
from ._lanes import flush_subnormals, load_row, load_state, store_lanes, store_state
from ._numba import CHANNEL_BLOCK, LN_2, TIME_CHUNK, exp2, kernel, part

# Planes of `beside` and of its gradient.
_BIAS, _SKIP = 0, 1
# Planes of the row of lanes that stands for one time step. In both passes:
_DELTA, _DRIVE = 0, 1
# in the forward pass only:
_U, _OUTPUT, _Z = 2, 3, 4
# in the backward pass only:
_GRAD_SCAN, _GRAD_DRIVE, _GRAD_DELTA, _SCAN = 2, 3, 4, 5
# Planes of the row that the backward pass reads a step into.
_READ, _READ_U, _READ_Z = 0, 1, 2
# Planes of the backward pass's row for the state in hand, and of its row for one time step of that state: the state
# before the step, and its decay in the step.
_A, _ADJOINT, _GRAD_A = 0, 1, 2
_BEFORE, _DECAY = 0, 1


@part
def _load_time_step(delta, b, t, first_channel, width, soft, beside, block, row, plane):
    """The time steps of a step: with their bias, and after the softplus."""
    flat, by_sequence, by_step = delta
    load_row(flat, b * by_sequence + t * by_step + first_channel, width, row, plane)
    for lane in range(CHANNEL_BLOCK):
        row[plane, lane] += beside[block, _BIAS, lane]
    if soft:
        for lane in range(CHANNEL_BLOCK):
            row[plane, lane] = softplus(row[plane, lane])


@part
def _load(rows, b, t, first_channel, width, row, plane):
    flat, by_sequence, by_step = rows
    load_row(flat, b * by_sequence + t * by_step + first_channel, width, row, plane)


@kernel
def scan_forward(
    u, delta, A_blocks, B, C, beside, z, soft, initial_state, y, final_state, boundaries, sequences, blocks
):  # fmt: skip
    r"""
    \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t, y_t = (C_t^\top h_t + D u_t) z_t \sigma(z_t) \\), for a range
    of sequences and of blocks.

    `boundaries` may have no chunks: then none is kept.
    """
    length, n_states = y.shape[1], B.shape[2]
    gated = z[0].size > 0
    state = np.empty((n_states, CHANNEL_BLOCK), y.dtype)
    row = np.empty((5, CHANNEL_BLOCK), y.dtype)
    for b in range(sequences[0], sequences[1]):
        for block in range(blocks[0], blocks[1]):
            first_channel = block * CHANNEL_BLOCK
            width = y.shape[2] - first_channel
            load_state(initial_state[b], first_channel, state)
            for t in range(length):
                if t % TIME_CHUNK == 0:
                    flush_subnormals(state)
                    if boundaries.shape[1] > 0:
                        boundaries[b, t // TIME_CHUNK, block] = state
                _load_time_step(delta, b, t, first_channel, width, soft, beside, block, row, _DELTA)
                _load(u, b, t, first_channel, width, row, _U)
                for lane in range(CHANNEL_BLOCK):
                    row[_DRIVE, lane] = row[_DELTA, lane] * row[_U, lane]
                    row[_OUTPUT, lane] = beside[block, _SKIP, lane] * row[_U, lane]
                for n in range(n_states):
                    b_n, c_n = B[b, t, n], C[b, t, n]
                    for lane in range(CHANNEL_BLOCK):
                        decay = exp2(row[_DELTA, lane] * A_blocks[block, n, lane])
                        h = decay * state[n, lane] + row[_DRIVE, lane] * b_n
                        state[n, lane] = h
                        row[_OUTPUT, lane] += h * c_n
                if gated:
                    _load(z, b, t, first_channel, width, row, _Z)
                    for lane in range(CHANNEL_BLOCK):
                        row[_OUTPUT, lane] *= row[_Z, lane] * logistic(row[_Z, lane])
                store_lanes(row, _OUTPUT, y, b, t, first_channel)
            store_state(state, final_state[b], first_channel)


@part
def _load_chunk(u, delta, z, grad_y, soft, beside, b, start, steps, block, width, read, step):
    """What the recurrence gets in a chunk, and the gradient of what it gives."""
    first_channel = block * CHANNEL_BLOCK
    gated = z[0].size > 0
    for t in range(steps):
        _load_time_step(delta, b, start + t, first_channel, width, soft, beside, block, step[t], _DELTA)
        _load(u, b, start + t, first_channel, width, read, _READ_U)
        _load(grad_y, b, start + t, first_channel, width, read, _READ)
        if gated:
            _load(z, b, start + t, first_channel, width, read, _READ_Z)
            for lane in range(CHANNEL_BLOCK):
                read[_READ, lane] *= read[_READ_Z, lane] * logistic(read[_READ_Z, lane])
        for lane in range(CHANNEL_BLOCK):
            step[t, _DRIVE, lane] = step[t, _DELTA, lane] * read[_READ_U, lane]
            step[t, _GRAD_SCAN, lane] = read[_READ, lane]
            step[t, _GRAD_DRIVE, lane] = 0.0
            step[t, _GRAD_DELTA, lane] = 0.0
            step[t, _SCAN, lane] = 0.0


@part
def _recompute_state(B, C, b, n, start, steps, step, state, history):
    """Run one state through a chunk again, keeping its values and its decays, and what it adds to the output."""
    for t in range(steps):
        b_n, c_n = B[b, start + t, n], C[b, start + t, n]
        for lane in range(CHANNEL_BLOCK):
            decay = exp2(step[t, _DELTA, lane] * state[_A, lane])
            history[t, _DECAY, lane] = decay
            h = decay * history[t, _BEFORE, lane] + step[t, _DRIVE, lane] * b_n
            history[t + 1, _BEFORE, lane] = h
            step[t, _SCAN, lane] += h * c_n


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
            grad_scan = step[t, _GRAD_SCAN, lane]
            adjoint = state[_ADJOINT, lane] + c_n * grad_scan
            grad_b += adjoint * step[t, _DRIVE, lane]
            grad_c += grad_scan * history[t + 1, _BEFORE, lane]
            step[t, _GRAD_DRIVE, lane] += adjoint * b_n
            adjoint *= history[t, _DECAY, lane]
            state[_ADJOINT, lane] = adjoint
            grad_exponent = adjoint * history[t, _BEFORE, lane]
            step[t, _GRAD_DELTA, lane] += grad_exponent * state[_A, lane]
            state[_GRAD_A, lane] += grad_exponent * step[t, _DELTA, lane]
        grad_B[b, start + t, n] += grad_b
        grad_C[b, start + t, n] += grad_c


@part
def _store_chunk(
    u, delta, z, grad_y, soft, beside, b, start, steps, block, width, read, step, sums, grad_u, grad_delta, grad_z
):  # fmt: skip
    """From the gradients of what the recurrence gets to those of the arguments; what is read again is in the cache."""
    first_channel = block * CHANNEL_BLOCK
    gated = z[0].size > 0
    ln_2 = step.dtype.type(LN_2)  # A_blocks holds A times log2(e)
    for t in range(steps):
        _load(u, b, start + t, first_channel, width, read, _READ_U)
        for lane in range(CHANNEL_BLOCK):
            grad_drive, skip = step[t, _GRAD_DRIVE, lane], beside[block, _SKIP, lane]
            step[t, _GRAD_DELTA, lane] = step[t, _GRAD_DELTA, lane] * ln_2 + grad_drive * read[_READ_U, lane]
            step[t, _GRAD_DRIVE, lane] = grad_drive * step[t, _DELTA, lane] + skip * step[t, _GRAD_SCAN, lane]
            sums[_SKIP, lane] += step[t, _GRAD_SCAN, lane] * read[_READ_U, lane]
        if soft:
            _load_time_step(delta, b, start + t, first_channel, width, False, beside, block, read, _READ)
            for lane in range(CHANNEL_BLOCK):
                step[t, _GRAD_DELTA, lane] *= softplus_slope(read[_READ, lane])
        for lane in range(CHANNEL_BLOCK):
            sums[_BIAS, lane] += step[t, _GRAD_DELTA, lane]
        if gated:
            _load(z, b, start + t, first_channel, width, read, _READ_Z)
            _load(grad_y, b, start + t, first_channel, width, read, _READ)
            for lane in range(CHANNEL_BLOCK):
                gate = logistic(read[_READ_Z, lane])
                slope = gate + read[_READ_Z, lane] * (gate - gate * gate)
                output = step[t, _SCAN, lane] + beside[block, _SKIP, lane] * read[_READ_U, lane]
                read[_READ, lane] *= output * slope
            store_lanes(read, _READ, grad_z, b, start + t, first_channel)
        store_lanes(step[t], _GRAD_DRIVE, grad_u, b, start + t, first_channel)
        store_lanes(step[t], _GRAD_DELTA, grad_delta, b, start + t, first_channel)


@kernel
def scan_backward(
    u, delta, A_blocks, B, C, beside, z, soft, boundaries, grad_y, grad_final_state,
    grad_u, grad_delta, grad_z, grad_A_blocks, grad_B, grad_C, grad_beside, grad_initial_state, sequences, blocks,
):  # fmt: skip
    """
    The gradient of [`scan_forward`], chunk by chunk from the end, one state after the other.

    Added to: `grad_A_blocks` (blocks, N, W), float64 and with respect to A itself, `grad_beside` (blocks, 2, W),
    float64, and `grad_B`, `grad_C` (batch, length, N). They belong to this unit alone.
    """
    length, n_states = grad_u.shape[1], B.shape[2]
    adjoint = np.empty((n_states, CHANNEL_BLOCK), grad_u.dtype)
    step = np.empty((TIME_CHUNK, 6, CHANNEL_BLOCK), grad_u.dtype)
    read = np.empty((3, CHANNEL_BLOCK), grad_u.dtype)
    sums = np.empty((2, CHANNEL_BLOCK), grad_u.dtype)
    state = np.empty((3, CHANNEL_BLOCK), grad_u.dtype)
    history = np.empty((TIME_CHUNK + 1, 2, CHANNEL_BLOCK), grad_u.dtype)
    for b in range(sequences[0], sequences[1]):
        for block in range(blocks[0], blocks[1]):
            first_channel = block * CHANNEL_BLOCK
            width = grad_u.shape[2] - first_channel
            load_state(grad_final_state[b], first_channel, adjoint)
            for chunk in range(boundaries.shape[1] - 1, -1, -1):
                start = chunk * TIME_CHUNK
                steps = min(TIME_CHUNK, length - start)
                flush_subnormals(adjoint)
                _load_chunk(u, delta, z, grad_y, soft, beside, b, start, steps, block, width, read, step)
                for n in range(n_states):
                    for lane in range(CHANNEL_BLOCK):
                        state[_A, lane] = A_blocks[block, n, lane]
                        state[_ADJOINT, lane] = adjoint[n, lane]
                        state[_GRAD_A, lane] = 0.0
                        history[0, _BEFORE, lane] = boundaries[b, chunk, block, n, lane]
                    _recompute_state(B, C, b, n, start, steps, step, state, history)
                    _run_adjoint(B, C, b, n, start, steps, step, state, history, grad_B, grad_C)
                    for lane in range(CHANNEL_BLOCK):
                        adjoint[n, lane] = state[_ADJOINT, lane]
                        grad_A_blocks[block, n, lane] += state[_GRAD_A, lane]
                sums[:] = 0.0
                _store_chunk(
                    u, delta, z, grad_y, soft, beside, b, start, steps, block, width, read, step, sums,
                    grad_u, grad_delta, grad_z,
                )  # fmt: skip
                for plane in range(2):
                    for lane in range(CHANNEL_BLOCK):
                        grad_beside[block, plane, lane] += sums[plane, lane]
            store_state(adjoint, grad_initial_state[b], first_channel)
