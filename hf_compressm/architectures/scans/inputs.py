"""What a selective layer hands to its scan, and the Gramians of that scan; observers know no more of a family."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import (
    default_sample_count,
    sample_times,
)
from ...systems import DiagonalLTI

_CHUNK = 2**16
# States of one channel at one step: more of them say nothing new of a Gramian, and a small N would sample every step.
_MOST_ROWS = 2**22


class ChannelScans(NamedTuple):
    """
    Some channels of a scan whose states are read by one C, each with an A and a time step of its own.

    Args:
        u (`torch.Tensor` of shape `(batch, length, M)`): Input.
        delta (`torch.Tensor` of shape `(batch, length, M)`): Positive time steps.
        A (`torch.Tensor` of shape `(M, N)` or `(batch, M, N)`): Negative decay rates.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout.
        output (`torch.Tensor` of shape `(batch, length, M)`): What was given for the scan's output.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    output: Tensor


class ScanInputs(ABC):
    """
    The arguments of one scan.

    A kind of recurrence is a frozen dataclass of the tensors that it takes, and last `part`. Whatever they are called
    there, it has three, as fields or as properties: `u` (`torch.Tensor` of shape `(batch, length, ...)`), the input,
    one entry a channel; `B` and `C` (`torch.Tensor` of shape `(batch, length, ..., N)`), what writes to the state and
    what reads it.
    """

    u: Tensor
    B: Tensor
    C: Tensor

    part: int | None
    """Which of a layer's scans it is, where one forward pass makes several whose states have nothing to do with one
    another. Their results are put side by side."""

    @property
    def state_size(self) -> int:
        """States per channel, N."""
        return self.B.shape[-1]

    @property
    def states_per_sequence(self) -> int:
        """How many numbers the state of one sequence holds."""
        return math.prod(self.u.shape[2:]) * self.state_size

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many states of N entries a Gramian of the scan is a sum over."""

    def detached(self) -> ScanInputs:
        """The same without gradients."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.detach() for name, value in values.items() if isinstance(value, Tensor)})

    def sample_times(self, generator: torch.Generator) -> Tensor:
        """Random steps, at most as many as make the Gramians cost what the recurrence costs; `(batch, K)` int64."""
        batch, length = self.u.shape[:2]
        enough = max(1, _MOST_ROWS // max(1, batch * math.prod(self.u.shape[2:])))
        return sample_times(batch, length, min(enough, default_sample_count(length, self.state_size)), generator)

    def squares(self) -> Tensor:
        """Mean squares over sequences and steps of each state's entry of B and of C, `(..., 2, N)` float64."""
        return torch.stack([entries.double().square().mean((0, 1)) for entries in (self.B, self.C)], dim=-2)

    def readout_gramian(self) -> Tensor:
        r"""Mean of \\( C_t C_t^\top \\) over sequences and steps, `(..., N, N)` float64."""
        C = self.C.flatten(0, 1).movedim(0, -2)
        # The widened copy of one chunk at a time.
        return sum(part.mT @ part for part in (chunk.double() for chunk in C.split(_CHUNK, dim=-2))) / C.shape[-2]

    @property
    def channel_count(self) -> int:
        """Channels whose states one C reads (of each group)."""
        return math.prod(self.u.shape[2:]) * self.state_size // math.prod(self.B.shape[2:])

    def channel_scans(self, channels: Tensor, output: Tensor) -> list[ChannelScans] | None:
        """
        Some channels as scans of their own, a list entry for each group; None where a state is no vector a channel.

        Args:
            channels (`torch.Tensor` of shape `(M,)`, int64): Below [`~ScanInputs.channel_count`], in every group.
            output (`torch.Tensor`): The scan's raw output, or something of its shape, to take the same channels of.
        """
        return None

    @abstractmethod
    def state_gramian(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """
        Sums of states over the sampled steps, scaled to all steps.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: P, `(..., N, N)`, and the readout energy, `(..., N)`; float64.
        """

    @abstractmethod
    def adjoint_gramian(self, grad_output: Tensor, times: Tensor) -> Tensor:
        """The sum Q of adjoint states, `(..., N, N)` float64, for a gradient of the shape of the scan's raw output."""


class TimeAverages(ABC):
    """What the inputs of a scan declare whose varying arguments may be replaced by their means over time."""

    @abstractmethod
    def sums(self) -> Tensor:
        """Sums over sequences and steps of all that varies, and last the number of steps; flat, float64."""

    @abstractmethod
    def averaged_systems(self) -> Callable[[Tensor], DiagonalLTI]:
        r"""
        What makes systems `(..., channels)` of the means that [`~TimeAverages.sums`] give; it holds no sequence.

        A channel is the system \\( \lambda = e^{\bar\Delta A}, b = \bar\Delta \bar B, c = \bar C \\).
        """


def _sums(*sequences: Tensor) -> Tensor:
    steps = sequences[0].shape[0] * sequences[0].shape[1]
    sums = torch.cat([sequence.detach().double().sum((0, 1)) for sequence in sequences])
    return torch.cat([sums, sums.new_tensor([float(steps)])])
