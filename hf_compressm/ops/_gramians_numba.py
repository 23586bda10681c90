r"""
The kernel behind the empirical Gramians on the CPU: a recurrence that hands out its state at some time steps.

\\( h_t = e^{\delta_t A} h_{t-1} + w_t b_t \\) with a scalar \\( w_t \\) for each channel and a vector \\( b_t \\) that
all channels share. The states of a selective scan have this form, and so have its adjoint states in reversed time.
"""

from __future__ import annotations

import numpy as np

from ._numba import CHANNEL_BLOCK, TIME_CHUNK, exp2, kernel, part
from ._selective_scan_numba import flush_subnormals, load_lanes

_DELTA, _DRIVE = 0, 1


@part
def _advance(delta, drive, A_blocks, B, b, t, block, row, state):
    load_lanes(delta, b, t, block * CHANNEL_BLOCK, row, _DELTA)
    load_lanes(drive, b, t, block * CHANNEL_BLOCK, row, _DRIVE)
    for n in range(state.shape[0]):
        b_n = B[b, t, n]
        for lane in range(CHANNEL_BLOCK):
            decay = exp2(row[_DELTA, lane] * A_blocks[block, n, lane])
            state[n, lane] = decay * state[n, lane] + row[_DRIVE, lane] * b_n


@kernel
def sample_states(delta, drive, A_blocks, B, times, first_sample, first_unit, states, samples, energies, units):
    """
    Run some units of work from their sample `first_sample - 1` on and write their next samples.

    Args:
        delta, drive: (batch, length, channels); B: (batch, length, N); A_blocks: see `_selective_scan_numba`.
        times: (batch, K) int64, in ascending order.
        first_unit: Where the list of units begins; unit i is block `i % blocks` of sequence `i // blocks`.
        states: (units, N, W), the state after the last sample; updated.
        samples: (N, units, samples, W) float64, written. Lanes without a channel become 0.
        energies: (units, samples, N) float64, written: the sum of squares over the lanes.
        units: The range of units, counted from `first_unit`, that this call runs.
    """
    n_blocks, n_states = A_blocks.shape[0], A_blocks.shape[1]
    row = np.empty((2, CHANNEL_BLOCK), delta.dtype)
    state = np.empty((n_states, CHANNEL_BLOCK), delta.dtype)
    for unit in range(units[0], units[1]):
        b, block = (first_unit + unit) // n_blocks, (first_unit + unit) % n_blocks
        state[:] = states[unit]
        t = times[b, first_sample - 1] + 1 if first_sample > 0 else 0
        for k in range(samples.shape[2]):
            while t <= times[b, first_sample + k]:
                if t % TIME_CHUNK == 0:
                    flush_subnormals(state)
                _advance(delta, drive, A_blocks, B, b, t, block, row, state)
                t += 1
            for n in range(n_states):
                energy = 0.0
                for lane in range(CHANNEL_BLOCK):
                    # To double precision before any product: a float32 product would drown small directions.
                    h = np.float64(state[n, lane])
                    samples[n, unit, k, lane] = h
                    energy += h * h
                energies[unit, k, n] = energy
        states[unit] = state
