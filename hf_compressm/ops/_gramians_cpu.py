r"""
Sampled states on the CPU and the sums of their outer products, in one kernel with the recurrence that makes the states.

\\( h_t = e^{\delta_t A} h_{t-1} + w_t b_t \\) with a scalar \\( w_t \\) for each channel and a vector \\( b_t \\) that
all channels share. The states of a selective scan have this form, and so have its adjoint states in reversed time.

The kernel of the sums multiplies by itself, rather than through a buffer and a matrix product of torch: nothing leaves
the cache, only half of the symmetric result is computed, and a product of a few states by very many samples is a shape
for which BLAS is not made.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ._lanes import flush_subnormals, load_lanes, load_state
from ._numba import CHANNEL_BLOCK, LOG2_E, TIME_CHUNK, exp2, kernel, part
from ._threads import run_units
from .selective_scan import channels_to_blocks, divide_work, zero_state

# How many samples of a channel block are multiplied together.
_SAMPLES = 2
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


@part
def _add_outer_products(samples, total):
    """Add `samples @ samples.T` to the lower triangle of `total`, in squares of 2 x 2: one load a product."""
    for n in range(0, samples.shape[0], 2):
        for m in range(0, n + 1, 2):
            first = second = third = fourth = 0.0
            for i in range(_SAMPLES * CHANNEL_BLOCK):
                first += samples[n, i] * samples[m, i]
                second += samples[n, i] * samples[m + 1, i]
                third += samples[n + 1, i] * samples[m, i]
                fourth += samples[n + 1, i] * samples[m + 1, i]
            total[n, m] += first
            total[n, m + 1] += second
            total[n + 1, m] += third
            total[n + 1, m + 1] += fourth


@kernel
def sum_outer_products(
    delta, drive, A_blocks, B, readout, times, initial_state, total, readout_energy, sequences, blocks
):  # fmt: skip
    """
    Run the recurrence over a range of sequences and of blocks, and add up its states at `times`, (batch, K).

    `delta`, `drive`, `A_blocks`, `B` and `initial_state`: see `_selective_scan_numba`; `readout`: (batch, length, N).
    Added to, float64: the lower triangle of `total`, (N or N + 1 if N is odd) squared, and `readout_energy`, (N,).
    """
    n_states = B.shape[2]
    row = np.empty((2, CHANNEL_BLOCK), delta.dtype)
    state = np.empty((n_states, CHANNEL_BLOCK), delta.dtype)
    samples = np.zeros((total.shape[0], _SAMPLES * CHANNEL_BLOCK), np.float64)
    for b in range(sequences[0], sequences[1]):
        for block in range(blocks[0], blocks[1]):
            load_state(initial_state[b], block * CHANNEL_BLOCK, state)
            t = 0
            filled = 0
            for k in range(times.shape[1]):
                while t <= times[b, k]:
                    if t % TIME_CHUNK == 0:
                        flush_subnormals(state)
                    _advance(delta, drive, A_blocks, B, b, t, block, row, state)
                    t += 1
                for n in range(n_states):
                    energy = 0.0
                    for lane in range(CHANNEL_BLOCK):
                        # To double precision before any product: a float32 product would drown small directions.
                        h = np.float64(state[n, lane])
                        samples[n, np.uintp(filled * CHANNEL_BLOCK + lane)] = h
                        energy += h * h
                    readout_energy[n] += energy * np.float64(readout[b, times[b, k], n]) ** 2
                filled += 1
                if filled == _SAMPLES or k == times.shape[1] - 1:
                    samples[:, filled * CHANNEL_BLOCK :] = 0.0
                    _add_outer_products(samples, total)
                    filled = 0


@kernel
def write_states(delta, drive, A_blocks, B, times, states, sequences, blocks):
    """
    Run the recurrence over a range of sequences and of blocks, and write its states at `times` to `states`.

    The arguments are those of `sum_outer_products`, but `A_blocks` has a first axis, one entry for all sequences or one
    each; `states`: (batch, K, channels, N).
    """
    n_states, channels = B.shape[2], delta.shape[2]
    row = np.empty((2, CHANNEL_BLOCK), delta.dtype)
    state = np.empty((n_states, CHANNEL_BLOCK), delta.dtype)
    for b in range(sequences[0], sequences[1]):
        rates = A_blocks[b if A_blocks.shape[0] > 1 else 0]
        for block in range(blocks[0], blocks[1]):
            state[:] = 0.0
            t = 0
            for k in range(times.shape[1]):
                while t <= times[b, k]:
                    if t % TIME_CHUNK == 0:
                        flush_subnormals(state)
                    _advance(delta, drive, rates, B, b, t, block, row, state)
                    t += 1
                first = block * CHANNEL_BLOCK
                for lane in range(min(CHANNEL_BLOCK, channels - first)):
                    for n in range(n_states):
                        states[b, k, np.uintp(first + lane), n] = state[n, lane]


def sampled_states(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, times: Tensor) -> Tensor:
    """
    The states that [`sampled_outer_products`] sums, `(batch, K, channels, N)`, from a zero state on.

    The arguments `delta`, `drive`, `A`, `B` and `times` are the same; `A` may also be `(batch, channels, N)`.
    """
    states = delta.new_empty(delta.shape[0], times.shape[1], *A.shape[-2:])
    A_blocks = torch.stack([channels_to_blocks(rates * LOG2_E) for rates in (A if A.ndim == 3 else [A])])
    inputs = [tensor.detach().contiguous().numpy() for tensor in (delta, drive, A_blocks, B, times, states)]
    sequence_ranges, block_ranges = divide_work(delta.shape[0], A_blocks.shape[1])
    run_units(write_states, [(*inputs, *unit) for unit in itertools.product(sequence_ranges, block_ranges)])
    return states


def sampled_outer_products(
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    times: Tensor,
    initial_state: Tensor | None = None,
    readout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Sums over sampled states of \\( h_t = e^{\delta_t A} h_{t-1} + w_t b_t \\).

    Args:
        delta, drive (`torch.Tensor` of shape `(batch, length, channels)`): \\( \delta \\) and \\( w \\), of one dtype.
        A (`torch.Tensor` of shape `(channels, N)`): Negative diagonals.
        B (`torch.Tensor` of shape `(batch, length, N)`): The vectors \\( b_t \\).
        times (`torch.Tensor` of shape `(batch, K)`, int64): Sampled steps, ascending.
        initial_state (`torch.Tensor` of shape `(batch, channels, N)`, *optional*): State before the first step.
        readout (`torch.Tensor` of shape `(batch, length, N)`, *optional*): The vectors \\( c_t \\); zero when unset.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\( \sum h h^\top \\), `(N, N)`, and \\( \sum (h_n c_n)^2 \\), `(N,)`, over
        sequences, samples and channels; float64.
    """
    n_states = A.shape[1]
    initial_state = zero_state(delta, A) if initial_state is None else initial_state.to(delta.dtype)
    readout = torch.zeros_like(B) if readout is None else readout.to(delta.dtype)
    A_blocks = channels_to_blocks(A * LOG2_E)
    inputs = [
        tensor.detach().contiguous().numpy() for tensor in (delta, drive, A_blocks, B, readout, times, initial_state)
    ]
    sequence_ranges, block_ranges = divide_work(delta.shape[0], A_blocks.shape[0])
    ranges = [(sequences, blocks) for sequences in sequence_ranges for blocks in block_ranges]
    padded = n_states + n_states % 2
    totals = torch.zeros(len(ranges), padded, padded, dtype=torch.float64)
    readout_energies = torch.zeros(len(ranges), n_states, dtype=torch.float64)
    outputs = zip(totals.numpy(), readout_energies.numpy())
    run_units(sum_outer_products, [(*inputs, *output, *unit) for output, unit in zip(outputs, ranges)])
    total = totals.sum(0)[:n_states, :n_states]
    return total.tril() + total.tril(-1).T, readout_energies.sum(0)
