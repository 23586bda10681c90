"""Sampled states and the sums of their outer products on any device, with a parallel scan along time in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._validation import double_device

_CHUNK = 64
_CHUNK_ELEMENTS = 2**23


def sampled_outer_products(
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    times: Tensor,
    initial_state: Tensor | None = None,
    readout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The sums of [`_gramians_cpu.sampled_outer_products`], without a Python loop over single time steps.

    The arguments `delta`, `drive`, `A`, `B`, `times`, `initial_state` and `readout` are the same. Time is cut into
    chunks of 64 steps, sequences and channels into groups, so that a chunk holds 8 million states at most; about six
    such arrays exist at once, 200 MB in float32.
    """
    delta, drive, A, B = (tensor.detach() for tensor in (delta, drive, A, B))
    times = times.to(delta.device)
    batch, _, channels = delta.shape
    n_states = A.shape[1]
    double = {"dtype": torch.float64, "device": double_device(delta.device)}
    total = torch.zeros(n_states, n_states, **double)
    readout_energy = torch.zeros(n_states, **double)
    for sequences, group in _pieces(batch, channels, n_states):
        state = None if initial_state is None else initial_state.detach()[sequences, group].to(delta.dtype)
        inputs = (delta[sequences, :, group], drive[sequences, :, group], A[group], B[sequences])
        for samples, sequence, _, time in _sampled_states(*inputs, times[sequences], state):
            # To double precision before any product: a float32 product would drown small directions.
            rows = samples.to(total.device).double()
            total.addmm_(rows.flatten(0, 1).T, rows.flatten(0, 1))
            if readout is not None:
                readouts = readout[sequences][sequence, time].to(total.device).double()
                readout_energy += (rows.square().sum(1) * readouts.square()).sum(0)
    return total, readout_energy


def sampled_states(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, times: Tensor) -> Tensor:
    """
    The states of [`_gramians_cpu.sampled_states`], in the memory of the sums and of the result.

    The arguments `delta`, `drive`, `A`, `B` and `times` are the same.
    """
    states = delta.new_empty(*times.shape, *A.shape[-2:])
    times = times.to(delta.device)
    for sequences, group in _pieces(*delta.shape[::2], A.shape[-1]):
        rates = A[group] if A.ndim == 2 else A[sequences, None, group]
        inputs = (delta[sequences, :, group], drive[sequences, :, group], rates, B[sequences])
        for samples, sequence, sample, _ in _sampled_states(*inputs, times[sequences], None):
            states[sequences, :, group][sequence, sample] = samples
    return states


def _pieces(batch: int, channels: int, n_states: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and channels that go together through a chunk."""
    n_channels = max(1, min(channels, _CHUNK_ELEMENTS // (_CHUNK * n_states)))
    n_sequences = max(1, _CHUNK_ELEMENTS // (_CHUNK * n_states * max(1, n_channels)))
    for first in range(0, batch, n_sequences):
        for first_channel in range(0, channels, n_channels):
            yield slice(first, first + n_sequences), slice(first_channel, first_channel + n_channels)


def _sampled_states(delta, drive, A, B, times, state) -> Iterator[tuple[Tensor, ...]]:
    """
    Chunk by chunk: the sampled states, (samples, channels, N), and the sequence, sample and step of each of them.

    A: (channels, N), or (batch, 1, channels, N).
    """
    if state is None:
        state = delta.new_zeros(delta.shape[0], delta.shape[2], A.shape[-1])
    for start in range(0, delta.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        decays = torch.exp(delta[:, chunk, :, None] * A)
        inputs = drive[:, chunk, :, None] * B[:, chunk, None]
        inputs[:, 0] += decays[:, 0] * state
        states = _parallel_scan(decays, inputs)
        state = states[:, -1].clone()
        sequence, sample = ((times >= start) & (times < start + _CHUNK)).nonzero(as_tuple=True)
        time = times[sequence, sample]
        yield states[sequence, time - start], sequence, sample, time


def _parallel_scan(decays: Tensor, inputs: Tensor) -> Tensor:
    r"""
    \\( h_t = a_t h_{t-1} + x_t \\) along axis 1 in \\( \log_2 \\) of its length passes; both arguments are overwritten.

    After the pass with shift s, `inputs` holds what the last 2s steps contribute and `decays` their product. Source:
    Hillis and Steele, 1986, "Data parallel algorithms". Products of decays only shrink, so nothing overflows.
    """
    shift = 1
    while shift < inputs.shape[1]:
        inputs[:, shift:] += decays[:, shift:] * inputs[:, :-shift]
        decays[:, shift:] = decays[:, shift:] * decays[:, :-shift]
        shift *= 2
    return inputs
