"""
Sampled states on a GPU and the sums of their outer products: one kernel walks along time with its states in registers.

Plain torch would write every state of every step to memory, some forty times over, to keep one in N / 8 of them. Here a
program holds the states of a few channels of one sequence and writes those at the sampled steps. The products are left
to torch: they need double precision, in which a matrix product has a library's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# States that one program holds: 32 registers for each thread of a warp.
_PROGRAM_STATES = 1024
_MOST_CHANNELS = 32
# Steps whose inputs are loaded together.
_MOST_STEPS = 8
# States that are written before they are multiplied: 64 MB in float32, twice that in float64.
_BUFFER_ELEMENTS = 2**24
# Rows of one product. A tall matrix is multiplied by its transpose in pieces side by side: one product of this shape
# leaves most of a GPU without work.
_ROWS = 4096


@triton.jit(do_not_specialize=["length", "count", "first", "taken", "rates_apart"])
def _walk(
    delta, drive, A, B, begins, times, state, samples, length, channels, count, first, taken, rates_apart,
    n_states: tl.constexpr, padded_states: tl.constexpr, lanes: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """
    Take the states of all channels of all sequences from one sample to the next, `taken` samples from `first` on.

    delta, drive: (batch, length, channels).  A: (channels, N) or (batch, channels, N), `rates_apart` entries from one
    sequence to the next.  B: (batch, length, N).  begins, times: (batch, count), the first and the last step on the way
    to each sample.  state: (batch, channels, N), read and overwritten.  samples: (batch, taken, channels, N), written.
    """
    sequence = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * lanes + tl.arange(0, lanes)
    n = tl.arange(0, padded_states)
    inside = (channel < channels)[:, None] & (n < n_states)[None, :]
    cell = channel[:, None] * n_states + n[None, :]
    rate = tl.load(A + sequence * rates_apart + cell, mask=inside, other=0.0)
    h = tl.load(state + sequence * channels * n_states + cell, mask=inside, other=0.0)
    for k in range(taken):
        begin = tl.load(begins + sequence * count + first + k)
        end = tl.load(times + sequence * count + first + k)
        for t in range(begin, end + 1, together):
            # What does not depend on the state is on its way for several steps at once; a step beyond the sample
            # has a time step and an input of zero, and changes nothing.
            for i in tl.static_range(together):
                step = sequence * length + t + i
                inward = tl.where(t + i <= end, 1, 0)
                d = tl.load(delta + step * channels + channel, mask=channel < inward * channels, other=0.0)
                w = tl.load(drive + step * channels + channel, mask=channel < inward * channels, other=0.0)
                b = tl.load(B + step * n_states + n, mask=n < inward * n_states, other=0.0)
                h = tl.exp(d[:, None] * rate) * h + w[:, None] * b[None, :]
        tl.store(samples + (sequence * taken + k) * channels * n_states + cell, h, mask=inside)
    tl.store(state + sequence * channels * n_states + cell, h, mask=inside)


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
    The sums of [`_gramians_cpu.sampled_outer_products`], on the GPU.

    The arguments are the same. 16 million states exist at once, with two copies in double precision: 350 MB.
    """
    batch, n_states = delta.shape[0], A.shape[-1]
    times = times.to(delta.device)
    double = {"dtype": torch.float64, "device": delta.device}
    total = torch.zeros(n_states, n_states, **double)
    readout_energy = torch.zeros(n_states, **double)
    sequence = torch.arange(batch, device=delta.device)[:, None]
    for states, chunk in _sampled_states(delta, drive, A, B, times, initial_state):
        # To double precision before any product: a float32 product would drown small directions.
        rows = states.double()
        if readout is not None:
            readouts = readout.detach()[sequence, times[:, chunk]].double()
            readout_energy += (rows.square().sum(2) * readouts.square()).sum((0, 1))
        _add_outer_products(rows.flatten(0, 2), total)
    return total, readout_energy


def sampled_states(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, times: Tensor) -> Tensor:
    """The states of [`_gramians_cpu.sampled_states`], on the GPU; the arguments are the same."""
    times = times.to(delta.device)
    chunks = [states for states, _ in _sampled_states(delta, drive, A, B, times, None)]
    return torch.cat(chunks, dim=1) if chunks else delta.new_empty(*times.shape, *A.shape[-2:])


def _sampled_states(
    delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, times: Tensor, initial_state: Tensor | None
) -> Iterator[tuple[Tensor, slice]]:
    """Some samples of all sequences after the other: states, (batch, samples, channels, N), and which samples."""
    delta, drive, A, B = (tensor.detach().contiguous() for tensor in (delta, drive, A, B))
    (batch, length, channels), n_states = delta.shape, A.shape[-1]
    count = times.shape[1]
    if not (batch and count and channels and n_states):
        return
    times = times.contiguous()
    begins = torch.cat([torch.zeros_like(times[:, :1]), times[:, :-1] + 1], dim=1)
    shape = (batch, channels, n_states)
    # A copy: the kernel writes to it.
    state = delta.new_zeros(shape) if initial_state is None else initial_state.detach().to(delta).clone(
        memory_format=torch.contiguous_format
    )  # fmt: skip
    padded = triton.next_power_of_2(n_states)
    lanes = max(1, min(_MOST_CHANNELS, _PROGRAM_STATES // padded))
    rates_apart = 0 if A.ndim == 2 else channels * n_states
    together = min(_MOST_STEPS, triton.next_power_of_2(max(1, length // count)))
    taken = max(1, min(count, _BUFFER_ELEMENTS // (batch * channels * n_states)))
    with torch.cuda.device_of(delta):
        for first in range(0, count, taken):
            here = min(taken, count - first)
            samples = delta.new_empty(batch, here, channels, n_states)
            _walk[(triton.cdiv(channels, lanes), batch)](
                delta, drive, A, B, begins, times, state, samples, length, channels, count, first, here,
                rates_apart, n_states=n_states, padded_states=padded, lanes=lanes, together=together, num_warps=1,
            )  # fmt: skip
            yield samples, slice(first, first + here)


def _add_outer_products(rows: Tensor, total: Tensor) -> None:
    """Add `rows.T @ rows` to `total`."""
    count = len(rows) // _ROWS
    whole = count * _ROWS
    pieces = rows[:whole].unflatten(0, (count, _ROWS))
    total += (pieces.mT @ pieces).sum(0)
    total.addmm_(rows[whole:].T, rows[whole:])
