"""Sums of outer products of sampled states on the CPU, through a bounded buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from ._gramians_numba import sample_states
from ._numba import CHANNEL_BLOCK, LOG2_E
from ._threads import run_units, split_range
from .selective_scan import channels_to_blocks

_BUFFER_BYTES = 16 * 2**20


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
        readout (`torch.Tensor` of shape `(batch, length, N)`, *optional*): The vectors \\( c_t \\).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\( \sum h h^\top \\), `(N, N)`, and \\( \sum (h_n c_n)^2 \\), `(N,)`, over
        sequences, samples and channels; float64. Without `readout` the second is zero.
    """
    delta, drive, B, times = (tensor.detach().contiguous() for tensor in (delta, drive, B, times))
    batch, _, channels = delta.shape
    n_states, n_samples = A.shape[1], times.shape[1]
    A_blocks = channels_to_blocks(A.detach() * LOG2_E)
    n_blocks = A_blocks.shape[0]
    states = delta.new_zeros(batch * n_blocks, n_states, CHANNEL_BLOCK)
    if initial_state is not None:
        padded = initial_state.new_zeros(batch, n_blocks * CHANNEL_BLOCK, n_states)
        padded[:, :channels] = initial_state.detach()
        states[:] = padded.view(batch * n_blocks, CHANNEL_BLOCK, n_states).transpose(1, 2)
    readout_energy = torch.zeros(n_states, dtype=torch.float64)
    total = torch.zeros(n_states, n_states, dtype=torch.float64)

    rows_in_buffer = _BUFFER_BYTES // (8 * n_states * CHANNEL_BLOCK)
    n_group = max(torch.get_num_threads(), rows_in_buffer // max(1, n_samples))
    n_together = max(1, min(n_samples, rows_in_buffer // n_group))
    inputs = [tensor.numpy() for tensor in (delta, drive, A_blocks, B, times)]
    for first_unit in range(0, batch * n_blocks, n_group):
        group = states[first_unit : first_unit + n_group]
        sequences = torch.arange(first_unit, first_unit + len(group)) // n_blocks
        for first_sample in range(0, n_samples, n_together):
            n_now = min(n_together, n_samples - first_sample)
            samples = total.new_empty(n_states, len(group), n_now, CHANNEL_BLOCK)
            energies = total.new_empty(len(group), n_now, n_states)
            outputs = [tensor.numpy() for tensor in (group, samples, energies)]
            ranges = split_range(len(group), 2 * torch.get_num_threads())
            run_units(sample_states, [(*inputs, first_sample, first_unit, *outputs, units) for units in ranges])
            rows = samples.view(n_states, -1)
            total.addmm_(rows, rows.T)
            if readout is not None:
                now = times[sequences, first_sample : first_sample + n_now]
                readout_energy += (energies * readout[sequences[:, None], now].double().square()).sum((0, 1))
    return total, readout_energy
