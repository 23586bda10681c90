r"""
Empirical Gramians of a time-invariant layer with diagonal state matrix, summed while the recurrence runs.

The closed forms of [`~systems.controllability_gramian`] assume white noise at the layer's input. These are sums over
what the layer really sees: of the states, \\( h_t = \Lambda h_{t-1} + B u_t \\), and of the adjoint states,
\\( g_t = \Lambda^H g_{t+1} + C^H \bar y_t \\), which are the gradient with respect to the states of a loss whose
gradient with respect to \\( y = \mathrm{Re}(C h) \\) is \\( \bar y \\). No sequence of states is ever stored.

Sources: input weighting, Enns, 1984, "Model reduction with balanced realizations: an error bound and a frequency
weighted generalization"; Gramians from adjoint states, Rowley, 2005, "Model reduction for fluids, using balanced proper
orthogonal decomposition".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._diagonal_pieces import pieces_of_states
from ._validation import double_device, require_shapes, validated_times


@torch.no_grad()
def diagonal_state_gramian(
    u: Tensor, lam: Tensor, B: Tensor, times: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""
    Sum of \\( h h^H \\) over sequences and time of one system, or of each of several that have a channel of input each.

    The recurrence runs over every step in complex128. Beyond a copy of the arguments, peak memory is about 100 MB, or
    the states of one step where these are more.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H_in)`): Input, any floating-point dtype and device; real, or
            complex.
        lam (`torch.Tensor` of shape `(N,)`, or `(H_in, N)` for one system a channel): Poles.
        B (`torch.Tensor` of shape `(N, H_in)`, or `(H_in, N)` for one system a channel): Input matrix.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): Steps of each sequence that enter the sum, in
            ascending order, as [`sample_times`] draws them; the sum is multiplied by length / K. All steps when unset.
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding. Steps of
            padding do not enter the sum; the state passes through them.

    Returns:
        `torch.Tensor` of shape `(N, N)` or `(H_in, N, N)`, complex128: Hermitian, on the device of `u` (on the CPU for
        devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    by_channel = lam.ndim == 2
    steps, poles = ("batch", "length"), ("H_in", "N") if by_channel else ("N",)
    inputs = ("H_in", "N") if by_channel else ("N", "H_in")
    sizes = require_shapes(allow_complex=True, u=(u, (*steps, "H_in")), lam=(lam, poles), B=(B, inputs))
    if mask is not None:
        require_shapes(u=(u.real, (*steps, "H_in")), mask=(mask.to(u.real.dtype), steps))
    times = validated_times(times, sizes["batch"], sizes["length"])
    device = double_device(u.device)
    u, lam, B = (tensor.to(device, torch.complex128) for tensor in (u, lam, B))
    weights = u.real.new_zeros(u.shape[:2])
    # A step that two windows have drawn counts twice.
    weights.scatter_add_(1, times.to(device), torch.ones_like(times, dtype=weights.dtype, device=device))
    if mask is not None:
        weights = weights * mask.to(device)
    total = _weighted_sum(u, lam, B, weights)
    total = total * (sizes["length"] / max(1, times.shape[1]))
    return (total + total.mH) / 2


@torch.no_grad()
def diagonal_adjoint_gramian(
    lam: Tensor, C: Tensor, grad_y: Tensor, times: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""
    Sum of \\( g g^H \\) over sequences and time, with the adjoint states of one system or of one a channel.

    Precision and memory are those of [`diagonal_state_gramian`].

    Args:
        lam (`torch.Tensor` of shape `(N,)`, or `(H_out, N)` for one system a channel): Poles.
        C (`torch.Tensor` of shape `(H_out, N)`): Readout; one row a channel for one system a channel.
        grad_y (`torch.Tensor` of shape `(batch, length, H_out)`): Gradient with respect to y.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`diagonal_state_gramian`].
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): As in [`diagonal_state_gramian`].

    Returns:
        `torch.Tensor` of shape `(N, N)` or `(H_out, N, N)`, complex128: Hermitian.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    poles = ("H_out", "N") if lam.ndim == 2 else ("N",)
    sizes = require_shapes(
        allow_complex=True, grad_y=(grad_y, ("batch", "length", "H_out")), lam=(lam, poles), C=(C, ("H_out", "N"))
    )
    times = validated_times(times, sizes["batch"], sizes["length"])
    reversed_mask = None if mask is None else mask.flip(1)
    # In reversed time the adjoint is a state with conjugate poles, driven by the gradient.
    B = C.conj() if lam.ndim == 2 else C.mH
    return diagonal_state_gramian(
        grad_y.flip(1), lam.conj(), B.resolve_conj(), sizes["length"] - 1 - times.flip(1), reversed_mask
    )


def _weighted_sum(u: Tensor, lam: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """The sum of `weights[b, t] h h^H`, one matrix a system."""
    systems, n = (lam.shape[0], lam.shape[1]) if lam.ndim == 2 else (1, lam.shape[0])
    total = u.new_zeros(systems, n, n)
    for start, states in pieces_of_states(u, lam, B):
        chosen = weights[:, start : start + states.shape[1]]
        kept = chosen > 0
        rows = (states[kept] * chosen[kept].sqrt().unsqueeze(-1)).unflatten(-1, (systems, n)).transpose(0, 1)
        total += rows.mT @ rows.conj()
    return total if lam.ndim == 2 else total[0]
