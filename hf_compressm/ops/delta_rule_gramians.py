r"""
Empirical Gramians of the delta rule, one pair a key head, by matrix products over the steps between samples.

In \\( S_t = (I - \beta_t k_t e_t^\top) \mathrm{diag}(a_t) S_{t-1} + \beta_t k_t v_t^\top \\) the states are the columns
of \\( S \\) (N x head_dim): the value heads that share a key head, and the entries of their values, are summed over.
Over the steps from one sample to the next, the writes of all steps solve one triangular system, so that both the state
at the end and the gradient at the beginning are a few products away from those at the other end.

Sources: the system, Yang, Wang, Zhang, Shen and Kim, 2024, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length" (arXiv 2406.06484); Gramians from states and gradients, Otto, Padovan and Rowley, 2022, "Model
reduction for nonlinear systems by balanced truncation of state and gradient covariance".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import DimensionError
from . import _delta_rule_stretches as stretches
from ._delta_rule_stretches import Rule, adjoints_at, states_at
from ._validation import double_device, elements_at_once, validated_times
from .delta_rule import require_delta_rule
from .multi_head_gramians import _stops


@torch.no_grad()
def delta_rule_state_gramian(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Sums of \\( h h^\top \\) and of \\( (h_n q_n)^2 \\) over sequences, time, value heads and the columns h of S.

    The states are computed in float32 (float64 for float64 arguments), and widened to float64 before they are
    multiplied. Beyond copies of the arguments, about 8 million states exist at once (four times as many on a GPU),
    100 MB with their double-precision copy, or one sample of one sequence where that is more.

    Args:
        query (`torch.Tensor` of shape `(batch, length, key_heads, N)`): As in [`delta_rule`].
        key (`torch.Tensor` of shape `(batch, length, key_heads, N)`): As in [`delta_rule`].
        value (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): As in [`delta_rule`].
        log_decay (`torch.Tensor` of shape `(batch, length, heads)` or `(batch, length, heads, N)`): As in
            [`delta_rule`].
        beta (`torch.Tensor` of shape `(batch, length, heads)`): As in [`delta_rule`].
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding. Steps of
            padding do not enter the sums; the state passes through them.
        erase (`torch.Tensor` of shape `(batch, length, key_heads, N)`, *optional*): As in [`delta_rule`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: P, `(key_heads, N, N)`, and the readout energy, `(key_heads, N)`; float64,
        on the device of `key` (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, the key heads do not divide the heads, or `times`
            is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    sizes = require_delta_rule(query, key, value, log_decay, beta, erase=erase)
    rule = Rule.of(query, key, log_decay, beta, erase, value=value)
    sums = _Sums(rule)
    times, mask = _validated(times, mask, sizes, key.device)
    with torch.autocast(key.device.type, enabled=False):
        for part, rows in _sequences(sizes, key.device):
            stops, sampled = _stops(times[part], sizes["length"])
            enters = _not_padding(sampled, stops, mask, part)
            for states, chunk in states_at(stops, rule.sequences(part)):
                sums.add(states, enters[:, chunk], rule.query[part][rows, stops[:, chunk]])
    return sums.scaled(sizes["length"] / max(1, times.shape[1]))


@torch.no_grad()
def delta_rule_adjoint_gramian(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    grad_output: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    erase: Tensor | None = None,
) -> Tensor:
    r"""
    Sum of \\( g g^\top \\) over sequences, time, value heads and the columns g of the adjoint states.

    \\( G_t = q_t \bar o_t^\top + \mathrm{diag}(a_{t+1}) (I - \beta_{t+1} e_{t+1} k_{t+1}^\top) G_{t+1} \\) is the
    gradient with respect to \\( S_t \\) of any function whose gradient with respect to o is \\( \bar o \\). Precision
    and memory are those of [`delta_rule_state_gramian`].

    Args:
        query (`torch.Tensor` of shape `(batch, length, key_heads, N)`): As in [`delta_rule`].
        key (`torch.Tensor` of shape `(batch, length, key_heads, N)`): As in [`delta_rule`].
        log_decay (`torch.Tensor` of shape `(batch, length, heads)` or `(batch, length, heads, N)`): As in
            [`delta_rule`].
        beta (`torch.Tensor` of shape `(batch, length, heads)`): As in [`delta_rule`].
        grad_output (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): Gradient with respect to o.
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): As in [`state_gramian`].
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): As in [`delta_rule_state_gramian`].
        erase (`torch.Tensor` of shape `(batch, length, key_heads, N)`, *optional*): As in [`delta_rule`].

    Returns:
        `torch.Tensor`: Q, `(key_heads, N, N)` float64, on the device of `key` (on the CPU for devices without float64).

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, the key heads do not divide the heads, or `times`
            is not ascending inside the sequence.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    sizes = require_delta_rule(query, key, grad_output, log_decay, beta, erase=erase)
    rule = Rule.of(query, key, log_decay, beta, erase, grad_output=grad_output)
    sums = _Sums(rule)
    times, mask = _validated(times, mask, sizes, key.device)
    with torch.autocast(key.device.type, enabled=False):
        for part, rows in _sequences(sizes, key.device):
            # Steps are counted from the end, and a stop lies before the step that it names: what follows it is summed.
            stops, sampled = _stops(sizes["length"] - 2 - times[part].flip(1), sizes["length"])
            for adjoints, chunk in adjoints_at(stops, rule.sequences(part)):
                steps = sizes["length"] - 2 - stops[:, chunk]
                enters = _not_padding(sampled[:, chunk], steps, mask, part)
                read = rule.by_value_head(rule.query[part][rows, steps], axis=2)
                adjoints = adjoints + read[..., None] * rule.grad_output[part][rows, steps][..., None, :]
                sums.add(adjoints, enters)
    return sums.scaled(sizes["length"] / max(1, times.shape[1]))[0]


class _Sums:
    """P or Q, and the readout energy, as they are summed."""

    def __init__(self, rule: Rule) -> None:
        heads, n_states = rule.key.shape[2:]
        double = {"dtype": torch.float64, "device": double_device(rule.key.device)}
        self.gramian = torch.zeros(heads, n_states, n_states, **double)
        self.readout_energy = torch.zeros(heads, n_states, **double)

    def add(self, states: Tensor, enters: Tensor, readout: Tensor | None = None) -> None:
        """
        Add the states that enter.

        states: (batch, stops, heads, N, head_dim).  enters: (batch, stops).  readout: (batch, stops, key heads, N).
        """
        heads, n_states = self.readout_energy.shape
        samples = states.flatten(0, 1) if bool(enters.all()) else states[enters]
        columns = samples.to(self.gramian.device).unflatten(1, (heads, -1)).permute(1, 3, 0, 2, 4)
        # To double precision before any product: a float32 product would drown small directions.
        rows = columns.to(torch.float64, memory_format=torch.contiguous_format).flatten(2)
        self.gramian.baddbmm_(rows, rows.mT)
        if readout is not None and len(samples):
            read = readout[enters].to(self.gramian.device).double().permute(1, 2, 0)
            self.readout_energy += (rows.square().unflatten(2, (len(samples), -1)).sum(3) * read.square()).sum(2)

    def scaled(self, factor: float) -> tuple[Tensor, Tensor]:
        """Both sums times a factor."""
        return factor * self.gramian, factor * self.readout_energy


def _validated(
    times: Tensor | None, mask: Tensor | None, sizes: dict[str, int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    batch, length = sizes["batch"], sizes["length"]
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, length)):
        raise DimensionError(
            f"`mask` has dtype {mask.dtype} and shape {tuple(mask.shape)}; expected bool and (batch {batch}, length "
            f"{length})."
        )
    return validated_times(times, batch, length).to(device), None if mask is None else mask.to(device)


def _sequences(sizes: dict[str, int], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Groups of sequences, and the index that picks a step of each of them."""
    states = sizes["heads"] * sizes["N"] * sizes["head_dim"]
    size = max(1, elements_at_once(stretches.CHUNK_ELEMENTS, device) // states)
    for first in range(0, sizes["batch"], size):
        part = slice(first, min(first + size, sizes["batch"]))
        yield part, torch.arange(part.stop - first, device=device)[:, None]


def _not_padding(sampled: Tensor, steps: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """Which of the samples at some steps are not padding, all (batch, stops)."""
    if mask is None:
        return sampled
    return sampled & mask[part].gather(1, steps.clamp_min(0))
