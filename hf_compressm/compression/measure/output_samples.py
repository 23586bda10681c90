"""Sampled steps of a layer's scans, with what the loss makes of an error in their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ...architectures import ChannelScans, ScanInputs
from ...errors import NotFiniteError
from ...ops import double_device, sample_times, sampled_states
from ...systems import OutputSamples

# What is kept of one part of a layer: 32 MB of states in single precision.
_NUMBERS = 2**23
_STEPS = 2048
# As long as there are so many.
_FEWEST = 512
_CHANNELS = 64
# Every block of sequences shows other channels.
_BLOCKS = 8
# Of the batch's steps, so that a fit costs little beside the pass.
_SHARE = 8
# One step in four judges a fit.
_HELD_OUT = 4


@torch.no_grad()
def sample_outputs(
    inputs: ScanInputs, grad_output: Tensor, generator: torch.Generator, weight: float = 1.0
) -> OutputSamples | None:
    """
    Sample steps and channels of a scan.

    An error of an output counts by the square of its gradient. Steps of other sequences judge a fit, or later ones
    where there are few sequences: steps that follow one another are much the same.

    Args:
        inputs ([`~architectures.ScanInputs`]): The scan.
        grad_output (`torch.Tensor`): Gradient of its raw output.
        generator (`torch.Generator`): Draws steps and channels.
        weight (`float`, *optional*, defaults to 1.0): A factor of all weights.

    Returns:
        [`~systems.OutputSamples`] or `None`: On the scan's device (the CPU for one without float64), with the layer's
            groups first where it has groups; None for a recurrence whose state is no vector a channel, and where a
            state or gradient is not finite.
    """
    count = min(_CHANNELS, inputs.channel_count)
    if inputs.channel_scans(torch.arange(count, device=inputs.u.device), grad_output) is None:
        return None
    batch, length = inputs.u.shape[:2]
    most = min(_most_steps(inputs.B[0, 0].numel() * count), max(_FEWEST, batch * length // _SHARE))
    times = sample_times(batch, length, max(1, min(length, most // batch)), generator)
    held_out = held_out_steps(*times.shape, generator)
    # Sequences are many where one step of each is more than enough.
    chosen = torch.randperm(batch, generator=generator)[: max(1, most // times.shape[1])]
    blocks = []
    for block in chosen.chunk(_BLOCKS):
        channels = torch.randperm(inputs.channel_count, generator=generator)[:count]
        scans = inputs.channel_scans(channels.to(inputs.u.device), grad_output)
        blocks.append([_of_sequences(scan, block.to(inputs.u.device)) for scan in scans])
    try:
        found = [_samples_of(_together(scans), times[chosen], held_out[chosen], weight) for scans in zip(*blocks)]
    except NotFiniteError:
        # The Gramians of such a batch are not finite either, which is said where all of them are known.
        return None
    return found[0] if inputs.B.ndim == 3 else _merged(found, torch.stack)


def _most_steps(numbers: int) -> int:
    return max(1, min(_STEPS, _NUMBERS // numbers))


def held_out_steps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """
    The sampled steps that judge a fit: those of one sequence in four, or the last quarter where there are few.

    Args:
        batch (`int`): Sequences.
        count (`int`): Steps of each.
        generator (`torch.Generator`): Draws the sequences.

    Returns:
        `torch.BoolTensor` of shape `(batch, count)`: On the CPU.
    """
    if batch >= _HELD_OUT:
        return (torch.randperm(batch, generator=generator) < batch // _HELD_OUT)[:, None].expand(-1, count)
    return (torch.arange(count) >= count - count // _HELD_OUT).expand(batch, -1)


def _of_sequences(scan: ChannelScans, sequences: Tensor) -> ChannelScans:
    """Some sequences of a scan, with the A of each."""
    u, delta, B, C, output = (tensor[sequences] for tensor in (scan.u, scan.delta, scan.B, scan.C, scan.output))
    return ChannelScans(u, delta, scan.A.expand(len(sequences), -1, -1), B, C, output)


def _together(scans: Sequence[ChannelScans]) -> ChannelScans:
    """Sequences that show other channels as one scan: a walk along time takes as long for few as for many."""
    return ChannelScans(*(torch.cat(tensors) for tensors in zip(*scans)))


def _samples_of(scan: ChannelScans, times: Tensor, held_out: Tensor, weight: float) -> OutputSamples:
    states = sampled_states(scan.u, scan.delta, scan.A, scan.B, times)
    rows = torch.arange(len(times))[:, None].to(scan.u.device), times.to(scan.u.device)
    weights = weight * scan.output[rows].float().square()
    device = double_device(scan.u.device)
    parts = (part.flatten(0, 1).float().to(device) for part in (scan.C[rows], states, weights))
    return OutputSamples(*parts, held_out.flatten().to(device))


def _merged(samples: Sequence[OutputSamples], merge: Callable[[list[Tensor]], Tensor]) -> OutputSamples:
    return OutputSamples(*(merge([getattr(one, field.name) for one in samples]) for field in fields(OutputSamples)))


def joined(
    before: OutputSamples | None, samples: OutputSamples | None, passes: int, generator: torch.Generator
) -> OutputSamples | None:
    """
    The samples of several passes, no more than of one: an equal share of each.

    Args:
        before ([`~systems.OutputSamples`], *optional*): Those of the passes before.
        samples ([`~systems.OutputSamples`], *optional*): Those of the new pass.
        passes (`int`): How many passes there are with the new one.
        generator (`torch.Generator`): Draws those that stay.
    """
    if before is None or samples is None:
        return samples if before is None else before
    axis = before.readout.ndim - 2
    most = max(before.readout.shape[axis], samples.readout.shape[axis])
    entering = _drawn(samples, axis, most // passes, generator)
    staying = _drawn(before, axis, most - entering.readout.shape[axis], generator)
    return _merged([staying, entering], lambda tensors: torch.cat(tensors, axis))


def _drawn(samples: OutputSamples, axis: int, count: int, generator: torch.Generator) -> OutputSamples:
    steps = torch.randperm(samples.readout.shape[axis], generator=generator)[:count].to(samples.readout.device)
    return _merged([samples], lambda tensors: tensors[0].index_select(axis, steps))


def side_by_side(samples: Sequence[OutputSamples | None]) -> OutputSamples | None:
    """The samples of a layer's parts along a new first axis; None unless there are as many of each."""
    known = [part for part in samples if part is not None]
    if len(known) < len(samples) or len({part.states.shape for part in known}) > 1:
        return None
    return _merged(known, torch.stack)
