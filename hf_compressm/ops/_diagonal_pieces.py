"""The states of diagonal recurrences, a bounded number of steps at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .diagonal_scan import diagonal_scan

# States that exist at once, in complex128: 32 MB.
_PIECE_STATES = 2**21


def pieces_of_states(u: Tensor, lam: Tensor, B: Tensor) -> Iterator[tuple[int, Tensor]]:
    """
    The states of one system, or of one a channel, piece by piece along time.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H)`): Input, of the dtype of `lam`.
        lam (`torch.Tensor` of shape `(N,)` or `(H, N)`): Poles.
        B (`torch.Tensor` of shape `(N, H)` or `(H, N)`): Input matrix.

    Yields:
        `tuple[int, torch.Tensor]`: The first step of a piece, and its states, `(batch, steps, N)` or `(batch, steps, H
        N)`.
    """
    poles = lam.flatten()
    state = u.new_zeros(u.shape[0], poles.shape[0])
    steps = max(1, _PIECE_STATES // max(1, state.numel()))
    for start in range(0, u.shape[1], steps):
        part = u[:, start : start + steps]
        drive = (part.unsqueeze(-1) * B).flatten(2) if lam.ndim == 2 else part @ B.mT
        states = diagonal_scan(poles, drive, state)
        state = states[:, -1]
        yield start, states
