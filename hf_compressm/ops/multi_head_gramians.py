r"""
Empirical Gramians of a multi-head layer (Mamba-2), group by group, by matrix products over the steps between samples.

The state of a head is a matrix, one row a channel; its decay is one number a step. So the state at a sampled step is
the one at the sample before, times one number, plus a product of two matrices with one row a step in between. Channels
and heads of a group share B, C and the state's indices, and are summed over.

Sources: the layer, Dao and Gu, 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7; Gramians from states and
gradients, Otto, Padovan and Rowley, 2022, "Model reduction for nonlinear systems by balanced truncation of state and
gradient covariance".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import DimensionError
from ._validation import compute_dtype, double_device, elements_at_once, require_shapes, validated_times

_CHUNK_ELEMENTS = 2**23


@torch.no_grad()
def multi_head_state_gramian(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    Sums of \\( h h^\top \\) and of \\( (h_n C_n)^2 \\) over sequences, time, and the channels of a group's heads.

    The state is \\( H_t = e^{\Delta_t A} H_{t-1} + \Delta_t u_t B_t^\top \\), one such matrix a head, whose rows are
    the \\( h \\). It is computed in float32 (float64 for float64 arguments); sampled states are widened to float64
    before they are multiplied. Beyond copies of the arguments, about 8 million states exist at once (four times as many
    on a GPU), 100 MB with their double-precision copy, or one sample of one sequence where that is more.

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Input, any floating-point dtype and device.
        delta (`torch.Tensor` of shape `(batch, length, heads)`): Time steps, after the softplus and its limits.
        A (`torch.Tensor` of shape `(heads,)`): Negative decay rate of each head.
        B (`torch.Tensor` of shape `(batch, length, groups, N)`): Input matrix; consecutive heads share a group's.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): Readout.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: P, `(groups, N, N)`, and the readout energy, `(groups, N)`; float64, on the
        device of `u` (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, the groups do not divide the heads, or `times` is
            not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps, inputs = ("batch", "length", "heads"), ("batch", "length", "groups", "N")
    sizes = require_shapes(
        u=(u, (*steps, "head_dim")), delta=(delta, steps), A=(A, ("heads",)), B=(B, inputs), C=(C, inputs)
    )
    times = _validated_times(times, sizes)
    dtype = compute_dtype(u, delta, A, B)
    u, delta, A, B = (tensor.to(dtype) for tensor in (u, delta, A, B))
    return state_sums(delta * A, delta.unsqueeze(-1) * u, B, C, times)


@torch.no_grad()
def multi_head_adjoint_gramian(
    delta: Tensor, A: Tensor, C: Tensor, grad_y: Tensor, times: Tensor | None = None
) -> Tensor:
    r"""
    Sum of \\( g g^\top \\) over sequences, time, and the channels of a group's heads, with the adjoint states.

    \\( G_t = \bar y_t C_t^\top + e^{\Delta_{t+1} A} G_{t+1} \\), whose rows are the \\( g \\), is the gradient with
    respect to \\( H_t \\) of any function whose gradient with respect to y is \\( \bar y \\). Precision and memory are
    those of [`multi_head_state_gramian`].

    Args:
        delta (`torch.Tensor` of shape `(batch, length, heads)`): Time steps, after the softplus and its limits.
        A (`torch.Tensor` of shape `(heads,)`): Negative decay rate of each head.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): Readout.
        grad_y (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Gradient with respect to y.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].

    Returns:
        `torch.Tensor`: Q, `(groups, N, N)` float64, on the device of `delta` (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, the groups do not divide the heads, or `times` is
            not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps, inputs = ("batch", "length", "heads"), ("batch", "length", "groups", "N")
    sizes = require_shapes(
        delta=(delta, steps), A=(A, ("heads",)), C=(C, inputs), grad_y=(grad_y, (*steps, "head_dim"))
    )
    times = _validated_times(times, sizes)
    dtype = compute_dtype(delta, A, C, grad_y)
    delta, A, C, grad_y = (tensor.to(dtype) for tensor in (delta, A, C, grad_y))
    return adjoint_sums(delta * A, C, grad_y, times)


def state_sums(log_decay: Tensor, drive: Tensor, B: Tensor, C: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    P and the readout energy of any recurrence \\( H_t = e^{a_t} H_{t-1} + d_t B_t^\top \\) with one decay a head.

    Args:
        log_decay (`torch.Tensor` of shape `(batch, length, heads)`): a, float32 or float64.
        drive (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): d, of the same dtype.
        B (`torch.Tensor` of shape `(batch, length, groups, N)`): What writes, of the same dtype.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): What reads.
        times (`torch.Tensor` of shape `(batch, K)`, int64): The sampled steps, ascending.
    """
    P, readout_energy = _outer_products(log_decay, drive, B, times, readout=C)
    scale = log_decay.shape[1] / max(1, times.shape[1])
    return scale * P, scale * readout_energy


def adjoint_sums(log_decay: Tensor, C: Tensor, grad_y: Tensor, times: Tensor) -> Tensor:
    """
    Q of the same recurrence, read by C.

    Args:
        log_decay (`torch.Tensor` of shape `(batch, length, heads)`): As in [`state_sums`].
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): What reads, of the same dtype.
        grad_y (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Gradient with respect to what is read.
        times (`torch.Tensor` of shape `(batch, K)`, int64): The sampled steps, ascending.
    """
    length = log_decay.shape[1]
    # In reversed time the adjoint is a state whose decay is that of the step it has just come back through.
    next_decay = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], dim=1)
    Q, _ = _outer_products(next_decay.flip(1), grad_y.flip(1), C.flip(1), length - 1 - times.flip(1))
    return length / max(1, times.shape[1]) * Q


def _validated_times(times: Tensor | None, sizes: dict[str, int]) -> Tensor:
    if sizes["heads"] % sizes["groups"]:
        raise DimensionError(f"there are {sizes['heads']} heads; {sizes['groups']} groups do not divide them.")
    return validated_times(times, sizes["batch"], sizes["length"])


def _outer_products(
    log_decay: Tensor, drive: Tensor, B: Tensor, times: Tensor, readout: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    The sums over sampled states of the recurrence with these logarithms of decays and inputs `drive B^T`.

    log_decay: (batch, length, heads).  drive: (batch, length, heads, head_dim).  B, readout: (batch, length, groups,
    N).  times: (batch, K).  Returns: (groups, N, N) and (groups, N), float64.
    """
    batch, length, heads, head_dim = drive.shape
    groups, n_states = B.shape[2:]
    double = {"dtype": torch.float64, "device": double_device(drive.device)}
    total = torch.zeros(groups, n_states, n_states, **double)
    readout_energy = torch.zeros(groups, n_states, **double)
    stops, sampled = _stops(times.to(drive.device), length)
    n_sequences = max(1, elements_at_once(_CHUNK_ELEMENTS, drive.device) // (heads * head_dim * n_states))
    # The products of float32 tensors would be made in the short type of a surrounding autocast.
    with torch.autocast(drive.device.type, enabled=False):
        for first in range(0, batch, n_sequences):
            part = slice(first, first + n_sequences)
            for states, chunk in _states_at(stops[part], log_decay[part], drive[part], B[part]):
                enters = sampled[part, chunk]
                # To double precision before any product: a float32 product would drown small directions.
                rows = states[enters].to(total.device).double()
                by_group = rows.transpose(0, 1).reshape(groups, -1, n_states)
                total.baddbmm_(by_group.mT, by_group)
                if readout is not None:
                    sequence, sample = enters.nonzero(as_tuple=True)
                    read = readout[first + sequence, stops[part, chunk][sequence, sample]].to(total.device).double()
                    readout_energy += (rows.square().sum(2) * read.square()).sum(0)
    return total, readout_energy


def _stops(times: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """
    The steps whose states are computed, (batch, stops), ascending, and which of them are samples.

    Where samples lie far apart, steps in between are added, so that the stretches from stop to stop, which are padded
    to one length, hold no more than a few times the sequence.
    """
    samples = times.shape[1]
    stride = -(-length // max(1, samples))
    gaps = times.diff(dim=1, prepend=times.new_full((len(times), 1), -1))
    if times.numel() == 0 or int(gaps.max()) <= 2 * stride:
        return times, torch.ones_like(times, dtype=torch.bool)
    grid = torch.arange(stride - 1, length, stride, device=times.device).expand(len(times), -1)
    stops, order = torch.cat([times, grid], dim=1).sort(dim=1, stable=True)
    return stops, order < samples


def _states_at(stops: Tensor, log_decay: Tensor, drive: Tensor, B: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Chunk by chunk: states at the stops, (batch, chunk, groups, rows, N), a row a channel, and the chunk's slice."""
    batch, _, heads, head_dim = drive.shape
    groups, n_states = B.shape[2:]
    width = int(stops.diff(dim=1, prepend=stops.new_full((batch, 1), -1)).max()) if stops.numel() else 0
    elements = batch * heads * head_dim * max(n_states, 2 * width)
    size = max(1, elements_at_once(_CHUNK_ELEMENTS, drive.device) // elements)
    state = drive.new_zeros(batch, groups, heads // groups, head_dim, n_states)
    before = stops.new_full((batch, 1), -1)
    for start in range(0, stops.shape[1], size):
        chunk = slice(start, start + size)
        ends = stops[:, chunk]
        begins = torch.cat([before, ends[:, :-1]], dim=1)
        before = ends[:, -1:]
        decays, increments = _stretches(begins, ends, width, log_decay, drive, B)
        decays = decays.unflatten(2, (groups, -1))[..., None, None]
        increments = increments.unflatten(3, (heads // groups, head_dim))
        for k in range(increments.shape[1]):
            state = increments[:, k].addcmul_(decays[:, k], state)
        state = state.clone()
        yield increments.flatten(3, 4), chunk


def _stretches(
    begins: Tensor, ends: Tensor, width: int, log_decay: Tensor, drive: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """
    What the steps after `begins` up to `ends` do to a state: (batch, stops, heads) decays and the sum of what they add.

    begins, ends: (batch, stops).  Returns the sums as (batch, stops, groups, channels of a group, N).
    """
    batch, stops = ends.shape
    groups = B.shape[2]
    steps = ends[..., None] - torch.arange(width - 1, -1, -1, device=ends.device)
    inside = steps > begins[..., None]
    steps = steps.clamp_min(0)
    sequence = torch.arange(batch, device=ends.device)[:, None, None]
    # Far down the sequence a running sum of logarithms has few digits left; a stretch has all of them.
    logs = log_decay[sequence, steps] * inside[..., None]
    through = logs.flip(2).cumsum(2).flip(2)
    remaining = torch.cat([through[:, :, 1:], torch.zeros_like(through[:, :, :1])], dim=2).exp() * inside[..., None]
    weighted = drive[sequence, steps] * remaining[..., None]
    left = weighted.reshape(batch, stops, width, groups, -1).permute(0, 1, 3, 4, 2)
    return through[:, :, 0].exp(), left @ B[sequence, steps].transpose(2, 3)
