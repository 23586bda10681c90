r"""
Empirical Gramians of the mLSTM (xLSTM), head by head, with its normaliser as one more column of the state.

With gates i and f before their activations, \\( m_t = \max(\log\sigma(f_t) + m_{t-1}, i_t) \\) from \\( m_0 = 0 \\), a
head keeps

\\[ S_t = e^{\log\sigma(f_t) + m_{t-1} - m_t} S_{t-1} + e^{i_t - m_t} k_t \tilde v_t^\top, \qquad
    \tilde v_t = (v_t, 1), \\]

whose last column n is the normaliser, and gives \\( h_t = a_t / (\max(|b_t|, e^{-m_t}) + \epsilon) \\) with \\( (a_t,
b_t) = S_t^\top q_t \\). This is the state as it is carried, scaled by \\( e^{-m_t} \\); m depends on the gates alone.

Source of the layer: Beck et al., 2024, "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), equations 19 to 27
and appendix A.3; of the Gramians, Otto, Padovan and Rowley, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._validation import compute_dtype, double_device, require_shapes, validated_times
from .multi_head_gramians import adjoint_sums, state_sums

_BLOCK = 64
_STEPS, _VECTORS, _VALUES = ("batch", "length", "heads"), ("batch", "length", "heads", "N"), ("head_dim",)


@torch.no_grad()
def mlstm_state_gramian(
    v: Tensor, i: Tensor, f: Tensor, k: Tensor, q: Tensor, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    Sums of \\( s s^\top \\) and of \\( (s_n q_n)^2 \\) over sequences, time and the columns s of a head's state.

    Args:
        v (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Values, any floating-point dtype and device.
        i (`torch.Tensor` of shape `(batch, length, heads)`): Input gate, before its exponential.
        f (`torch.Tensor` of shape `(batch, length, heads)`): Forget gate, before its sigmoid.
        k (`torch.Tensor` of shape `(batch, length, heads, N)`): Keys.
        q (`torch.Tensor` of shape `(batch, length, heads, N)`): Queries, after their scale.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: P, `(heads, N, N)`, and the readout energy, `(heads, N)`; float64.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    sizes = require_shapes(v=(v, (*_STEPS, *_VALUES)), i=(i, _STEPS), f=(f, _STEPS), k=(k, _VECTORS), q=(q, _VECTORS))
    times = validated_times(times, sizes["batch"], sizes["length"])
    dtype = compute_dtype(v, i, f, k)
    _, log_decay, weight = (gate.to(k.device, dtype) for gate in stabilised_gates(i, f))
    columns = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1)
    return state_sums(log_decay, weight.unsqueeze(-1) * columns, k.to(dtype), q, times)


@torch.no_grad()
def mlstm_adjoint_gramian(
    i: Tensor,
    f: Tensor,
    k: Tensor,
    q: Tensor,
    h: Tensor,
    grad_h: Tensor,
    eps: float = 1e-6,
    times: Tensor | None = None,
) -> Tensor:
    r"""
    Sum of \\( g g^\top \\) over sequences, time and columns, with the gradient of a loss in each column of the state.

    The loss reaches the state through both parts of the quotient: with \\( d_t = \max(|b_t|, e^{-m_t}) + \epsilon \\),
    \\( \bar a_t = \bar h_t / d_t \\), and \\( \bar b_t = -\bar h_t^\top h_t \, \mathrm{sign}(b_t) / d_t \\) where
    \\( |b_t| > e^{-m_t} \\), else zero.

    Args:
        i (`torch.Tensor` of shape `(batch, length, heads)`): Input gate, before its exponential.
        f (`torch.Tensor` of shape `(batch, length, heads)`): Forget gate, before its sigmoid.
        k (`torch.Tensor` of shape `(batch, length, heads, N)`): Keys.
        q (`torch.Tensor` of shape `(batch, length, heads, N)`): Queries, after their scale.
        h (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): The output.
        grad_h (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Gradient with respect to it.
        eps (`float`, *optional*, defaults to 1e-6): What is added to the denominator.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].

    Returns:
        `torch.Tensor`: Q, `(heads, N, N)` float64.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or `times` is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    outputs = (*_STEPS, *_VALUES)
    sizes = require_shapes(
        i=(i, _STEPS), f=(f, _STEPS), k=(k, _VECTORS), q=(q, _VECTORS), h=(h, outputs), grad_h=(grad_h, outputs)
    )
    times = validated_times(times, sizes["batch"], sizes["length"])
    dtype = compute_dtype(i, f, k, q, h, grad_h)
    m, log_decay, weight = (gate.to(k.device, dtype) for gate in stabilised_gates(i, f))
    k, q, h, grad_h = (tensor.to(dtype) for tensor in (k, q, h, grad_h))
    with torch.autocast(h.device.type, enabled=False):
        b = _read_normalisers(log_decay, weight, k, q)
        least = torch.exp(-m)
        reciprocal = 1 / (torch.maximum(b.abs(), least) + eps)
        grad_b = -(grad_h * h).sum(-1) * b.sign() * (b.abs() > least) * reciprocal
        columns = torch.cat([grad_h * reciprocal.unsqueeze(-1), grad_b.unsqueeze(-1)], dim=-1)
    return adjoint_sums(log_decay, q, columns, times)


def stabilised_gates(i: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    m, the logarithm of the decay and the weight of what is written, `(batch, length, heads)` float64 each.

    They are on the device of the gates, or on the CPU where that one has no float64.

    Args:
        i (`torch.Tensor` of shape `(batch, length, heads)`): Input gate, before its exponential.
        f (`torch.Tensor` of shape `(batch, length, heads)`): Forget gate, before its sigmoid.
    """
    i, f = (gate.to(device=double_device(gate.device), dtype=torch.float64) for gate in (i, f))
    forget = torch.nn.functional.logsigmoid(f)
    # m is the largest of all that a step, or the start, has come down to since.
    total = forget.cumsum(1)
    m = total + (i - total).cummax(1).values.clamp_min(0)
    before = torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], dim=1)
    # Neither is positive but for rounding.
    return m, (forget + before - m).clamp_max(0), torch.exp((i - m).clamp_max(0))


def _read_normalisers(log_decay: Tensor, weight: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """What the queries read of the normaliser at each step, (batch, length, heads), block by block."""
    n = torch.zeros_like(k[:, 0])
    found = []
    for decays, weights, keys, queries in zip(*(x.split(_BLOCK, dim=1) for x in (log_decay, weight, k, q))):
        total = decays.cumsum(1)
        between = (total.unsqueeze(2) - total.unsqueeze(1)).clamp_max(0).exp() * weights.unsqueeze(1)
        scores = torch.einsum("bthn,bshn->btsh", queries, keys) * between
        inside = scores.movedim(-1, 1).tril().sum(-1).transpose(1, 2)
        found.append(inside + total.exp() * torch.einsum("bthn,bhn->bth", queries, n))
        left = (total[:, -1:] - total).exp() * weights
        n = total[:, -1, :, None].exp() * n + torch.einsum("bsh,bshn->bhn", left, keys)
    return torch.cat(found, dim=1)
