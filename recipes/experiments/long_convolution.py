"""Layers of LRU by convolution, for trainings whose sequences are long and whose layers are narrow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_compressm.models.sequence import modeling_lru
from hf_compressm.ops import diagonal_recurrence

# Below it, the scan is the quicker of the two on a CPU (8 channels, 784 steps).
_FEWEST_STATES = 48


def recurrence_by_convolution(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """
    What [`ops.diagonal_recurrence`] computes, from the impulse responses of all pairs of an input and an output.

    Its time hardly depends on the number of states, but grows with the square of the width. Few states, and a state to
    go on from, are left to the scan.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H_in)`): Input.
        lam (`torch.Tensor` of shape `(N,)`): Poles, complex.
        B (`torch.Tensor` of shape `(N, H_in)`): Input matrix, complex.
        C (`torch.Tensor` of shape `(H_out, N)`): Readout, complex.
        initial_state (`torch.Tensor` of shape `(batch, N)`, *optional*): The state before the first step, complex.

    Returns:
        `tuple`: y, `(batch, length, H_out)`, and the last state, which is None where a convolution was computed.
    """
    if initial_state is not None or lam.shape[0] < _FEWEST_STATES:
        return diagonal_recurrence(u, lam, B, C, initial_state)
    length, outputs, inputs = u.shape[1], C.shape[0], B.shape[1]
    pairs = (C.unsqueeze(1) * B.mT).flatten(0, 1)
    responses = _impulse_responses(lam, pairs, length).to(u.dtype).unflatten(0, (outputs, inputs))
    size = 2 * length
    # One product of (batch, inputs) and (inputs, outputs) for each frequency.
    frequencies = torch.fft.rfft(u.mT, size).movedim(-1, 0) @ torch.fft.rfft(responses, size).movedim(-1, 0).mT
    return torch.fft.irfft(frequencies.movedim(0, -1), size)[..., :length].mT, None


def _impulse_responses(lam: Tensor, weights: Tensor, length: int) -> Tensor:
    """`Re sum_n weights_n lam_n^t` of shape (pairs, length), in float32; powers of a pole that is not zero."""
    steps = math.isqrt(length - 1) + 1
    times = torch.arange(steps, dtype=torch.float64, device=lam.device).unsqueeze(-1)
    inner, outer = (torch.exp(torch.log(lam) * spacing * times).to(torch.complex64) for spacing in (1, steps))
    late = weights.to(torch.complex64).unsqueeze(1) * outer
    # Real products only: Re(a b) = Re(a) Re(b) - Im(a) Im(b).
    left, right = torch.view_as_real(late).flatten(-2), torch.view_as_real(inner.conj().resolve_conj()).flatten(-2)
    return (left @ right.mT).flatten(1)[:, :length]


@contextmanager
def lru_by_convolution() -> Iterator[None]:
    """While the context is open, LRU layers that are not asked for their state are computed by convolution."""
    before = modeling_lru.diagonal_recurrence
    modeling_lru.diagonal_recurrence = recurrence_by_convolution
    try:
        yield
    finally:
        modeling_lru.diagonal_recurrence = before
