r"""
The multi-head recurrence of Mamba-2: by matrix products over short chunks of time, on any device and in plain torch, or
with few states on a CPU as a selective scan, whose kernel walks along time.

transformers' fallback repeats B and C for every head, pads the sequence to a multiple of the kernel's chunk (256 steps
by default), and forms all its intermediate arrays at that size. Here heads of a group share the products of their B
and C, and a chunk has the length that suits a CPU's caches. The products between the steps of a chunk cost the same
with few states as with many, so few are better brought from step to step one by one.

Source: Dao and Gu, 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6, the block decomposition of the scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DimensionError
from ._derivatives import plain_eager_call
from ._validation import compute_dtype, require_shapes
from .selective_scan import selective_scan

_CHUNK = 64
# Up to so many states a CPU is faster step by step.
_FEW_STATES = 16


def multi_head_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    \\( H_t = e^{\Delta_t A} H_{t-1} + \Delta_t u_t B_t^\top \\) and \\( y_t = H_t C_t \\), with derivatives of every
    order.

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Input, any floating-point dtype and device.
        delta (`torch.Tensor` of shape `(batch, length, heads)`): Time steps, after the softplus and its limits.
        A (`torch.Tensor` of shape `(heads,)`): Negative decay rate of each head.
        B (`torch.Tensor` of shape `(batch, length, groups, N)`): Input matrix; consecutive heads share a group's.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): Readout.
        initial_state (`torch.Tensor` of shape `(batch, heads, head_dim, N)`, *optional*): State before the first step;
            zero when unset.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y, `(batch, length, heads, head_dim)`, and the last state, `(batch, heads,
        head_dim, N)`; float32, or float64 where an argument is.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or the groups do not divide the heads.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    sizes = _validated_sizes(u, delta, A, B, C, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    groups = sizes["groups"]
    # The products of float32 tensors would be made in the short type of a surrounding autocast.
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
        if initial_state is None:
            initial_state = u.new_zeros(*(sizes[name] for name in ("batch", "heads", "head_dim", "N")))
        state = initial_state.to(dtype).unflatten(1, (groups, -1))
        if sizes["length"] == 0:
            return torch.zeros_like(u), state.flatten(1, 2)
        scan = _scan_by_steps if _steps_are_faster(u, delta, A, B, C, state) else _scan_in_chunks
        y, state = scan(u, delta, A, B, C, state)
        return y, state.flatten(1, 2)


def _steps_are_faster(*tensors: Tensor) -> bool:
    state = tensors[-1]
    return state.device.type == "cpu" and state.shape[-1] <= _FEW_STATES and plain_eager_call(*tensors)


def _scan_by_steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of at least one step as a selective scan a group, whose channels are those of its heads."""
    groups, heads_of_group, head_dim = state.shape[1:4]
    u = u.unflatten(2, (groups, -1)).flatten(3)
    # All channels of a head have its time step and its decay.
    delta = delta.unflatten(2, (groups, -1))[..., None].expand(-1, -1, -1, -1, head_dim).flatten(3)
    A = A.view(groups, -1, 1, 1).expand(-1, -1, head_dim, B.shape[-1]).flatten(1, 2)
    scans = [
        selective_scan(u[:, :, g], delta[:, :, g], A[g], B[:, :, g], C[:, :, g], state[:, g].flatten(1, 2))
        for g in range(groups)
    ]
    # One group needs no copy.
    join = torch.stack if groups > 1 else lambda parts, dim: parts[0].unsqueeze(dim)
    y, states = (join(parts, dim=axis) for parts, axis in zip(zip(*scans), (2, 1)))
    return y.unflatten(3, (heads_of_group, head_dim)).flatten(2, 3), states.unflatten(2, (heads_of_group, head_dim))


def _scan_in_chunks(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """
    The scan of at least one step by products within chunks of time, and states between them.

    state: (batch, groups, heads of a group, head_dim, N), before the first step; returned in the same form.
    """
    length, groups, heads_of_group, head_dim = u.shape[1], *state.shape[1:4]
    size = min(_CHUNK, length)
    # (batch, chunks, groups, heads of a group, steps[, head_dim]) and (batch, chunks, groups, steps, N)
    logs = _chunks(delta * A, size).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    inputs = _chunks(u * delta[..., None], size).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    B, C = (_chunks(tensor, size).transpose(2, 3) for tensor in (B, C))
    through = logs.cumsum(-1)

    # Sums, and not a difference that is masked: their gradients need no pass over all pairs of steps.
    later = through.new_full((size, size), -torch.inf).triu(1)
    decays = (through[..., :, None] + (-through)[..., None, :]).add_(later).exp()
    within = (decays * (C @ B.mT)[:, :, :, None]) @ inputs

    to_end = (through[..., -1:] - through).exp()
    added = ((inputs * to_end[..., None]).mT.flatten(3, 4) @ B).unflatten(3, (heads_of_group, head_dim))
    whole = through[..., -1].exp()[..., None, None]
    begins = []
    for chunk_added, chunk_decay in zip(added.unbind(1), whole.unbind(1)):
        begins.append(state)
        state = torch.addcmul(chunk_added, chunk_decay, state)
    from_before = C @ torch.stack(begins, dim=1).flatten(3, 4).mT
    from_before = from_before.unflatten(4, (heads_of_group, head_dim)).transpose(3, 4)
    y = torch.addcmul(within, from_before, through.exp()[..., None])
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)[:, :length]
    # Callers take views of the result.
    return y.contiguous(), state


def multi_head_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    [`multi_head_scan`] as a plain loop over time, with the same arguments, results and errors.

    Args:
        u (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Input.
        delta (`torch.Tensor` of shape `(batch, length, heads)`): Time steps.
        A (`torch.Tensor` of shape `(heads,)`): Negative decay rate of each head.
        B (`torch.Tensor` of shape `(batch, length, groups, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, length, groups, N)`): Readout.
        initial_state (`torch.Tensor` of shape `(batch, heads, head_dim, N)`, *optional*): State before the first step.
    """
    sizes = _validated_sizes(u, delta, A, B, C, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    B, C = (tensor.repeat_interleave(sizes["heads"] // sizes["groups"], dim=2) for tensor in (B, C))
    shape = (sizes["batch"], sizes["heads"], sizes["head_dim"], sizes["N"])
    state = u.new_zeros(shape) if initial_state is None else initial_state.to(dtype)
    outputs = [torch.zeros_like(u[:, :0])]
    for t in range(sizes["length"]):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        state = decay * state + (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1)[:, None])
    return torch.cat(outputs, dim=1), state


def _validated_sizes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> dict[str, int]:
    steps, inputs = ("batch", "length", "heads"), ("batch", "length", "groups", "N")
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "heads", "head_dim", "N"))}
    sizes = require_shapes(
        u=(u, (*steps, "head_dim")), delta=(delta, steps), A=(A, ("heads",)), B=(B, inputs), C=(C, inputs), **states
    )
    if sizes["heads"] % sizes["groups"]:
        raise DimensionError(f"there are {sizes['heads']} heads; {sizes['groups']} groups do not divide them.")
    return sizes


def _chunks(sequence: Tensor, size: int) -> Tensor:
    """(batch, length, ...) as (batch, chunks, size, ...), with zeros at the end: steps that leave a state as it is."""
    missing = -sequence.shape[1] % size
    padded = F.pad(sequence, (0, 0) * (sequence.ndim - 2) + (0, missing)) if missing else sequence
    return padded.unflatten(1, (-1, size))
