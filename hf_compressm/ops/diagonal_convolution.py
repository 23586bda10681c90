r"""
Single-input, single-output systems with diagonal state matrix, one for each channel, as in S4D.

\\( h_t = \lambda \odot h_{t-1} + 1 u_t, y_t = \mathrm{Re}(c^\top h_t) \\) is the convolution of u with
\\( k_l = \mathrm{Re} \sum_n c_n \lambda_n^l \\) (Gu et al. 2022, arXiv 2206.11893). Only the product of input and
readout weight matters in such a system; it is all in c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._validation import require_shapes


def channel_systems_reference(
    u: Tensor, lam: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    One system for each channel, as a loop over time that keeps every state.

    The arguments `u`, `lam`, `C` and `initial_state`, the results and the errors are those of [`channel_systems`].
    """
    _require_valid(u, lam, C, initial_state)
    dtype = _complex_dtype(u)
    lam, C, drive = lam.to(dtype), C.to(dtype), u.to(dtype)
    state = lam.new_zeros(u.shape[0], *lam.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for step in drive.unbind(1):
        state = lam * state + step.unsqueeze(-1)
        outputs.append((C * state).sum(-1).real)
    return (torch.stack(outputs, dim=1) if outputs else drive.real).to(u.dtype), state


def channel_systems(
    u: Tensor, lam: Tensor, C: Tensor, initial_state: Tensor | None = None, return_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """
    One single-input, single-output system for each channel, applied to a batch of real sequences by convolution.

    `h[t] = lam h[t-1] + u[t]`, `y[t] = Re(sum_n C_n h_n[t])`. Time grows with `length log(length)` and hardly with the
    number of states; no state is computed but the last. A float64 input is computed in float64, everything else in
    float32, and the powers of the poles always in float64.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype.
        lam (`torch.Tensor` of shape `(channels, N)`): Poles, complex.
        C (`torch.Tensor` of shape `(channels, N)`): Product of input and readout weight of each state, complex.
        initial_state (`torch.Tensor` of shape `(batch, channels, N)`, *optional*): The state before the first step,
            complex; zero when unset.
        return_state (`bool`, *optional*, defaults to `True`): Whether to compute the state after the last step.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: y, `(batch, length, channels)`, in the dtype of `u`, and the state
        after the last step, `(batch, channels, N)`, complex64 or complex128, or None.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: arguments are on different devices, or `u` is not real and floating-point.
    """
    _require_valid(u, lam, C, initial_state)
    dtype = _complex_dtype(u)
    y_dtype, length = u.dtype, u.shape[1]
    u = u.to(dtype.to_real())
    if length == 0:
        state = lam.new_zeros(u.shape[0], *lam.shape) if initial_state is None else initial_state
        return u.to(y_dtype), state.to(dtype) if return_state else None
    lam, C = lam.to(torch.complex128), C.to(torch.complex128)
    if length == 1 and initial_state is not None:
        state = (lam * initial_state + u.transpose(1, 2)).to(dtype)
        return (C.to(dtype) * state).sum(-1).real.unsqueeze(1).to(y_dtype), state
    inner, outer = _power_tables(lam, length)
    signal = u.transpose(1, 2).contiguous()
    y = _causal_convolution(signal, _modes_over_time(C, inner, outer, length).to(u.dtype))
    if initial_state is not None:
        free = C * lam * initial_state
        y = y + _modes_over_time(free, inner, outer, length).to(u.dtype)
    y = y.transpose(1, 2).to(y_dtype)
    if not return_state:
        return y, None
    state = _last_state(signal, inner, outer).to(dtype)
    if initial_state is not None:
        state = state + (lam**length * initial_state).to(dtype)
    return y, state


def convolution_kernel(lam: Tensor, C: Tensor, length: int) -> Tensor:
    r"""
    The impulse responses \\( k_l = \mathrm{Re} \sum_n c_n \lambda_n^l \\) of all channels.

    With \\( l = T i + j \\), powers are needed for i and for j only, about \\( 2 \sqrt{length} \\) of each pole; one
    matrix product for each channel puts them together.

    Args:
        lam (`torch.Tensor` of shape `(channels, N)`): Poles, complex.
        C (`torch.Tensor` of shape `(channels, N)`): Product of input and readout weight of each state, complex.
        length (`int`): Number of steps, at least 1.

    Returns:
        `torch.Tensor` of shape `(channels, length)`, float64.
    """
    lam, C = lam.to(torch.complex128), C.to(torch.complex128)
    return _modes_over_time(C, *_power_tables(lam, length), length)


def _modes_over_time(C: Tensor, inner: Tensor, outer: Tensor, length: int) -> Tensor:
    """`Re sum_n C_n lam_n^l` for all l below length: C is (..., channels, N), the result (..., channels, length)."""
    late = C.unsqueeze(-2) * outer
    # Real products only: Re(a b) = Re(a) Re(b) - Im(a) Im(b).
    left = torch.cat([late.real, -late.imag], dim=-1)
    right = torch.cat([inner.real, inner.imag], dim=-1).mT
    return (left @ right).flatten(-2)[..., :length]


def _last_state(signal: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """`sum_s lam^(length - 1 - s) u[s]` of shape (batch, channels, N); signal is (batch, channels, length)."""
    steps, chunks = inner.shape[-2], outer.shape[-2]
    reversed_signal = torch.nn.functional.pad(signal.flip(-1), (0, steps * chunks - signal.shape[-1]))
    parts = reversed_signal.unflatten(-1, (chunks, steps)).to(inner.dtype)
    return torch.einsum("bhcs,hsn,hcn->bhn", parts, inner, outer)


def _causal_convolution(signal: Tensor, kernel: Tensor) -> Tensor:
    """(batch, channels, length) with (channels, length), by FFT on twice the length."""
    length = signal.shape[-1]
    size = _fast_length(2 * length - 1)
    spectrum = torch.fft.rfft(signal, n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length]


def _fast_length(least: int) -> int:
    """The smallest even number of the form 2^i 3^j 5^k that is not below the given one."""
    best = 1 << (least - 1).bit_length()
    for five in (1, 5, 25):
        for three in (1, 3, 9, 27):
            odd = five * three
            even = odd << max(1, (-(-least // odd) - 1).bit_length())
            best = min(best, even)
    return max(2, best)


def _power_tables(lam: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`lam^j` for j below T, and `lam^(T i)` for i below length / T, with T about the root of length: (..., T, N)."""
    steps = max(1, math.isqrt(length))
    inner = _powers(lam, steps)
    return inner, _powers(inner[..., -1, :] * lam, -(-length // steps))


def _powers(lam: Tensor, count: int) -> Tensor:
    """`1, lam, lam^2, ...` of shape (..., count, N), by doubling: no logarithm, so that a pole may be zero."""
    powers, factor = torch.ones_like(lam).unsqueeze(-2), lam.unsqueeze(-2)
    while powers.shape[-2] < count:
        powers = torch.cat([powers, powers * factor], dim=-2)
        factor = factor * factor
    return powers[..., :count, :]


def _complex_dtype(u: Tensor) -> torch.dtype:
    return torch.complex128 if u.dtype == torch.float64 else torch.complex64


def _require_valid(u: Tensor, lam: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    require_shapes(u=(u, ("batch", "length", "channels")))
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "channels", "N"))}
    require_shapes(
        allow_complex=True,
        u=(u, ("batch", "length", "channels")),
        lam=(lam, ("channels", "N")),
        C=(C, ("channels", "N")),
        **states,
    )
