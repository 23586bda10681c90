"""States of a recurrence at some of its steps: it runs over all of them, and only those are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ._diagonal_pieces import pieces_of_states
from ._state_kernels import implementation_for
from ._validation import compute_dtype, double_device, require_shapes, validated_times


@torch.no_grad()
def sampled_states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, times: Tensor) -> Tensor:
    r"""
    The states \\( h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t \\) at sampled steps.

    They are computed in float32 (float64 for float64 arguments), on the CPU and on GPUs that Triton knows in a compiled
    kernel and elsewhere as a parallel scan. Beyond copies of the arguments and the result, peak memory is one state a
    thread on the CPU, and about 350 MB elsewhere, whatever the length.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype and device.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, after the softplus.
        A (`torch.Tensor` of shape `(channels, N)` or `(batch, channels, N)`): Diagonal of each channel's state matrix,
            negative; of each sequence's channels where they are not the same ones.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix of each step.
        times (`torch.Tensor` of shape `(batch, K)`, int64): The steps of each sequence, ascending.

    Returns:
        `torch.Tensor` of shape `(batch, K, channels, N)`: The states, on the device of `u`.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps = ("batch", "length", "channels")
    rates = ("batch", "channels", "N") if A.ndim == 3 else ("channels", "N")
    sizes = require_shapes(u=(u, steps), delta=(delta, steps), A=(A, rates), B=(B, ("batch", "length", "N")))
    times = validated_times(times, sizes["batch"], sizes["length"])
    dtype = compute_dtype(u, delta, A, B)
    u, delta, A, B = (tensor.to(dtype) for tensor in (u, delta, A, B))
    return implementation_for(u.device).sampled_states(delta, delta * u, A, B, times)


@torch.no_grad()
def sampled_diagonal_states(u: Tensor, lam: Tensor, B: Tensor, times: Tensor) -> Tensor:
    r"""
    The states \\( h_t = \Lambda h_{t-1} + B u_t \\) of one system, or of one a channel, at sampled steps.

    Computed in complex128. Beyond copies of the arguments and the result, peak memory is about 100 MB, or the states of
    one step where these are more.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H)`): Input, any floating-point dtype and device.
        lam (`torch.Tensor` of shape `(N,)`, or `(H, N)` for one system a channel): Poles.
        B (`torch.Tensor` of shape `(N, H)`, or `(H, N)` for one system a channel): Input matrix.
        times (`torch.Tensor` of shape `(batch, K)`, int64): The steps of each sequence, ascending.

    Returns:
        `torch.Tensor` of shape `(batch, K, N)` or `(batch, K, H, N)`, complex128: The states, on the device of `u` (on
        the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    by_channel = lam.ndim == 2
    poles, inputs = (("H", "N"), ("H", "N")) if by_channel else (("N",), ("N", "H"))
    arguments = {"u": (u, ("batch", "length", "H")), "lam": (lam, poles), "B": (B, inputs)}
    sizes = require_shapes(allow_complex=True, **arguments)
    times = validated_times(times, sizes["batch"], sizes["length"]).to(double_device(u.device))
    u, lam, B = (tensor.to(times.device, torch.complex128) for tensor in (u, lam, B))
    found = u.new_empty(*times.shape, lam.numel())
    for start, states in pieces_of_states(u, lam, B):
        sequences, places = ((times >= start) & (times < start + states.shape[1])).nonzero(as_tuple=True)
        found[sequences, places] = states[sequences, times[sequences, places] - start]
    return found.unflatten(-1, lam.shape)
