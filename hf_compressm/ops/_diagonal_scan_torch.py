r"""
The diagonal scan in plain torch, for devices without a kernel of ours.

Time is cut into chunks. Inside a chunk, \\( h_t = \sum_{s \le t} \lambda^{t-s} x_s \\) is one product with a lower
triangular Toeplitz matrix for each state; the chunks' last states are a sequence again, shorter and with poles
\\( \lambda^{chunk} \\), and are scanned in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32


def scan_by_products(lam: Tensor, x: Tensor, initial_state: Tensor) -> Tensor:
    """
    All states of `h[t] = lam h[t-1] + x[t]`, differentiable any number of times.

    Args:
        lam (`torch.Tensor` of shape `(N,)`): Poles, complex.
        x (`torch.Tensor` of shape `(batch, length, N)`): What drives the states, complex.
        initial_state (`torch.Tensor` of shape `(batch, N)`): The state before the first step, complex.

    Returns:
        `torch.Tensor` of shape `(batch, length, N)`, complex.
    """
    batch, length, n = x.shape
    if length == 0:
        return x
    chunk = min(CHUNK, length)
    n_chunks = -(-length // chunk)
    padded = torch.nn.functional.pad(x, (0, 0, 0, n_chunks * chunk - length))
    # (N, chunk, batch * chunks): one matrix for each state.
    inside = padded.reshape(batch, n_chunks, chunk, n).permute(3, 2, 0, 1).reshape(n, chunk, batch * n_chunks)
    powers = _powers(lam, chunk + 1)
    states = (_toeplitz(powers[:, :chunk]) @ inside).view(n, chunk, batch, n_chunks)
    if n_chunks > 1:
        last = states[:, -1].permute(1, 2, 0)
        carried = scan_by_products(powers[:, chunk], last[:, :-1], initial_state)
        before = torch.cat([initial_state.unsqueeze(1), carried], dim=1)
    else:
        before = initial_state.unsqueeze(1)
    states = states + powers[:, 1:, None, None] * before.permute(2, 0, 1).unsqueeze(1)
    return states.permute(2, 3, 1, 0).reshape(batch, n_chunks * chunk, n)[:, :length]


def _powers(lam: Tensor, count: int) -> Tensor:
    """`lam ** 0` to `lam ** (count - 1)`, `(N, count)`."""
    # By products: torch raises a complex number through its logarithm, which gives NaN for one that has underflowed to
    # zero, as the poles of long chunks do.
    powers = torch.ones_like(lam).unsqueeze(-1)
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers * (powers[:, -1:] * lam.unsqueeze(-1))], dim=-1)
    return powers[:, :count]


def _toeplitz(powers: Tensor) -> Tensor:
    """`T[n, t, s] = powers[n, t - s]` for s <= t, and 0 above the diagonal; powers is (N, chunk)."""
    steps = torch.arange(powers.shape[-1], device=powers.device)
    lag = steps.unsqueeze(-1) - steps
    return torch.where(lag >= 0, powers[:, lag.clamp_min(0)], torch.zeros((), dtype=powers.dtype, device=powers.device))
