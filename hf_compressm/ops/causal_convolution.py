r"""
The short convolution in front of a selective scan, with its activation: readable and fast.

\\( f_t = b + \sum_{k=0}^{K-1} w_k u_{t-K+1+k} \\), a filter of its own for every channel, and \\( f_t \sigma(f_t) \\)
(the SiLU) of it.

Source: Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
section 3.4.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..errors import ConfigurationError
from ._causal_convolution_numba import convolution_kernels
from ._derivatives import is_transformed, needs_graph, plain_gradients
from ._strided import rows
from ._threads import run_units
from ._validation import compute_dtype, require_cpu, require_shapes, require_step
from .selective_scan import WORTH_SHARING, as_arrays, blocks_to_channels, channels_to_blocks, divide_work


def causal_convolution_reference(u: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """
    The convolution as a sum over shifted copies, on any device and differentiable any number of times.

    The arguments `u`, `weight`, `bias` and `silu`, the result and the errors are those of [`causal_convolution`].
    """
    _require_valid(u, weight, bias)
    dtype = compute_dtype(u, weight)
    length, n_taps = u.shape[1], weight.shape[1]
    padded = F.pad(u.to(dtype), (0, 0, n_taps - 1, 0))
    filtered = sum(weight[:, k].to(dtype) * padded[:, k : k + length] for k in range(n_taps))
    filtered = filtered if bias is None else filtered + bias.to(dtype)
    return (F.silu(filtered) if silu else filtered).to(u.dtype)


def causal_convolution(u: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    r"""
    The convolution and its activation as one CPU kernel with its own backward pass.

    For the backward pass nothing is kept but the arguments: what the filter gave is computed again. float64 arguments
    are computed in float64, everything else in float32. The result does not depend on the number of threads; the last
    bits of the gradients of `weight` and `bias` do.

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input, any floating-point dtype. It may be a part of a
            larger tensor; it is not copied as long as its channels lie next to each other.
        weight (`torch.Tensor` of shape `(channels, K)`): The taps of each channel, that of the present step last.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to what the filter gives.
        silu (`bool`, *optional*, defaults to `False`): Whether the SiLU follows.

    Returns:
        `torch.Tensor` of shape `(batch, length, channels)`: In the dtype of `u`. It has derivatives of every kind and
        order; those that the kernel does not know are computed through [`causal_convolution_reference`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, or not floating-point; or there is no tap.
    """
    _require_valid(u, weight, bias)
    require_cpu("causal_convolution", u, "causal_conv1d")
    if is_transformed():
        return causal_convolution_reference(u, weight, bias, silu)
    dtype = compute_dtype(u, weight)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    # Conversions happen outside of the function below, so that autograd undoes them.
    return _CausalConvolution.apply(u.to(dtype), weight.to(dtype), bias.to(dtype), silu).to(u.dtype)


def causal_convolution_step(
    state: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """
    One step of the convolution from the inputs before it, which are moved on in place.

    It has no derivative; [`causal_convolution`] of these inputs and the new one has.

    Args:
        state (`torch.Tensor` of shape `(batch, channels, K)`): The last K inputs, the newest last; after the call those
            with the new one. Contiguous, float32 or float64; all is computed in its dtype.
        u (`torch.Tensor` of shape `(batch, 1, channels)`): The new input, any floating-point dtype.
        weight (`torch.Tensor` of shape `(channels, K)`): The taps of each channel, that of the new input last.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to what the filter gives.
        silu (`bool`, *optional*, defaults to `False`): Whether the SiLU follows.

    Returns:
        `torch.Tensor` of shape `(batch, 1, channels)`: In the dtype of the state.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or there is more than one step.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, not floating-point or needs a gradient; the state
            has another dtype or gaps; or there is no tap. Nothing is written then.
    """
    arguments = {"u": (u, ("batch", "length", "channels")), "weight": (weight, ("channels", "K"))}
    arguments |= {} if bias is None else {"bias": (bias, ("channels",))}
    require_step("causal_convolution_step", state, ("batch", "channels", "K"), arguments)
    _require_taps(weight)
    out = state.new_empty(u.shape)
    bias = state.new_zeros(weight.shape[0]) if bias is None else bias
    arrays = as_arrays(state.dtype, state, u, weight, bias)
    sequences, channels = divide_work(state.shape[0], weight.shape[0], shared=state.numel() >= WORTH_SHARING)
    units = [(*arrays, silu, out.numpy(), s, c) for s in sequences for c in channels]
    run_units(convolution_kernels(weight.shape[1]).step, units)
    return out


class _CausalConvolution(Function):
    """[`causal_convolution`] on tensors of one dtype."""

    @staticmethod
    def forward(ctx, u, weight, bias, silu):
        ctx.save_for_backward(u, weight, bias)
        ctx.silu = silu
        out = u.new_empty(u.shape)
        taps = _taps(weight, bias)
        arrays = (rows(u), taps.numpy(), silu, out.numpy())
        sequence_ranges, block_ranges = divide_work(u.shape[0], taps.shape[0])
        run_units(
            convolution_kernels(weight.shape[1]).forward,
            [(*arrays, s, k) for s in sequence_ranges for k in block_ranges],
        )
        return out

    @staticmethod
    def backward(ctx, grad_out):
        u, weight, bias = ctx.saved_tensors
        if needs_graph(grad_out):
            reference = functools.partial(causal_convolution_reference, silu=ctx.silu)
            return *plain_gradients(reference, (u, weight, bias), (grad_out,)), None
        taps = _taps(weight, bias)
        grad_u = u.new_empty(u.shape)
        sequence_ranges, block_ranges = divide_work(u.shape[0], taps.shape[0])
        # Units of several ranges of sequences add to the same taps: one copy for each.
        grad_taps = taps.new_zeros(len(sequence_ranges), *taps.shape, dtype=torch.float64)
        arrays = (rows(u), taps.numpy(), ctx.silu, rows(grad_out), grad_u.numpy())
        units = [
            (*arrays, grad_taps[i].numpy(), sequences, blocks)
            for i, sequences in enumerate(sequence_ranges)
            for blocks in block_ranges
        ]
        run_units(convolution_kernels(weight.shape[1]).backward, units)
        gradient = blocks_to_channels(grad_taps.sum(0), weight.shape[0]).to(weight.dtype)
        return grad_u, gradient[:, :-1], gradient[:, -1], None


def _taps(weight: Tensor, bias: Tensor) -> Tensor:
    """(blocks, K + 1, W): the taps and the bias of the channels of a block side by side."""
    return channels_to_blocks(torch.cat([weight.detach(), bias.detach()[:, None]], dim=1))


def _require_valid(u: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    others = {} if bias is None else {"bias": (bias, ("channels",))}
    axes = ("batch", "length", "channels")
    require_shapes(u=(u, axes), weight=(weight, ("channels", "K")), **others)
    _require_taps(weight)


def _require_taps(weight: Tensor) -> None:
    if weight.shape[1] == 0:
        raise ConfigurationError("`weight` has no tap; a filter needs at least one a channel.")
