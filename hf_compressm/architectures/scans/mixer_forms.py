"""How the mixers of Mamba's families hold what all of them have: the projections and the scans between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import has_hook_of_accelerate, own_parameters
from .convolution import ACTIVATIONS

_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


class MixerScan(NamedTuple):
    """
    The arguments of one scan of a mixer, by the names of [`~ops.selective_scan`].

    Args:
        u (`torch.Tensor` of shape `(batch, length, channels)`): Input.
        delta (`torch.Tensor` of shape `(batch, length, channels)`): Time steps, before bias and softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Decay rates.
        B (`torch.Tensor` of shape `(batch, length, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, length, N)`): Readout.
        D (`torch.Tensor` of shape `(channels,)`): Skip connection.
        z (`torch.Tensor` of shape `(batch, length, channels)`): Gate.
        delta_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Of the time steps.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor | None


class MixerForm(ABC):
    """One way to hold them."""

    takes_steps: ClassVar[bool]
    """Whether a single step from a cached state is one call of a kernel."""

    _parts: ClassVar[tuple[str, ...]]
    """Attributes that a mixer of the form has."""

    _read: ClassVar[dict[str, type[nn.Module]]]
    """Modules whose weights the forward pass reads, instead of calling them, and their class."""

    @abstractmethod
    def input_and_gate(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """
        The two halves of what `in_proj` makes.

        Args:
            projected (`torch.Tensor` of shape `(batch, length, 2 * channels)`): What it makes.
        """

    @abstractmethod
    def scans(self, mixer: Any, x: Tensor, gate: Tensor) -> Iterator[MixerScan]:
        """
        The scans of a mixer, whose outputs lie side by side.

        Args:
            mixer (`torch.nn.Module`): The mixer.
            x (`torch.Tensor` of shape `(batch, length, channels)`): What the convolution makes.
            gate (`torch.Tensor` of shape `(batch, length, channels)`): The other half.
        """

    def matches(self, mixer: nn.Module) -> bool:
        """
        Whether a mixer has the parts of the form, and those whose weights are read are no wrappers of others.

        Args:
            mixer (`torch.nn.Module`): A mixer.
        """
        if not all(hasattr(mixer, name) for name in self._parts) or _is_quantised(mixer):
            return False
        if mixer.activation not in ACTIVATIONS:
            return False
        read = [getattr(mixer, name, None) for name in self._read]
        # A hook of accelerate brings weights to the device before they are read, which the stock forward pass sees to.
        return all(
            type(part) is cls and not has_hook_of_accelerate(part) for part, cls in zip(read, self._read.values())
        )

    def parameters_read(self, mixer: nn.Module) -> list[nn.Parameter]:
        """
        The parameters that the forward pass reads by itself.

        Args:
            mixer (`torch.nn.Module`): A mixer of the form.
        """
        owners = (mixer, *(getattr(mixer, name) for name in self._read))
        found = [parameter for owner in owners for parameter in own_parameters(owner).values()]
        return [parameter for parameter in found if parameter is not None]


def _is_quantised(mixer: nn.Module) -> bool:
    # Private API of transformers.
    return hasattr(mixer.config, "_is_quantized")


class SingleForm(MixerForm):
    """That of Mamba, and of FalconMamba and Jamba with their norms: one scan of all channels."""

    takes_steps = True
    _parts = (
        "A_log", "D", "activation", "in_proj", "layer_idx", "out_proj", "ssm_state_size", "time_step_rank", "x_proj",
    )  # fmt: skip
    _read = {"conv1d": nn.Conv1d, "dt_proj": nn.Linear}

    def matches(self, mixer: nn.Module) -> bool:
        """Besides: all norms or none."""
        has_norms = [hasattr(mixer, name) for name in _NORMS]
        return any(has_norms) == all(has_norms) and super().matches(mixer)

    def input_and_gate(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The first half and the second."""
        x, gate = projected.chunk(2, dim=-1)
        return x, gate

    def scans(self, mixer: Any, x: Tensor, gate: Tensor) -> Iterator[MixerScan]:
        """
        One.

        Args:
            mixer (`torch.nn.Module`): The mixer.
            x (`torch.Tensor` of shape `(batch, length, channels)`): What the convolution makes.
            gate (`torch.Tensor` of shape `(batch, length, channels)`): The other half.
        """
        n_states, dt_proj = mixer.ssm_state_size, mixer.dt_proj
        time_step, B, C = mixer.x_proj(x).split([mixer.time_step_rank, n_states, n_states], dim=-1)
        if hasattr(mixer, _NORMS[0]):
            time_step, B, C = (getattr(mixer, name)(tensor) for name, tensor in zip(_NORMS, (time_step, B, C)))
        bias = None if dt_proj.bias is None else dt_proj.bias.float()
        A, D = -torch.exp(mixer.A_log.float()), mixer.D.float()
        yield MixerScan(x, F.linear(time_step, dt_proj.weight), A, B, C, D, gate, bias)


class HeadsForm(MixerForm):
    """That of Zamba: heads side by side, each with projections and a scan of its own."""

    # The states of a head have gaps between sequences.
    takes_steps = False
    _parts = (
        "A_log", "D", "activation", "dt_proj_bias", "dt_proj_weight", "in_proj", "n_mamba_heads", "out_proj",
        "ssm_state_size", "time_step_rank", "x_proj_weight",
    )  # fmt: skip
    _read = {"conv1d": nn.Conv1d}

    def input_and_gate(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """They take turns, channel by channel: one copy brings each together."""
        x, gate = projected.unflatten(-1, (-1, 2)).movedim(-1, 0).contiguous()
        return x, gate

    def scans(self, mixer: Any, x: Tensor, gate: Tensor) -> Iterator[MixerScan]:
        """
        One a head.

        Args:
            mixer (`torch.nn.Module`): The mixer.
            x (`torch.Tensor` of shape `(batch, length, channels)`): What the convolution makes.
            gate (`torch.Tensor` of shape `(batch, length, channels)`): The other half.
        """
        rows = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        by_head = (x.chunk(mixer.n_mamba_heads, dim=-1), gate.chunk(mixer.n_mamba_heads, dim=-1))
        own = (mixer.x_proj_weight, mixer.dt_proj_weight, -torch.exp(mixer.A_log.float()), mixer.D.float())
        for u, z, x_proj, dt_proj, A, D, bias in zip(*by_head, *own, mixer.dt_proj_bias.float(), strict=True):
            time_step, B, C = F.linear(u, x_proj).split(rows, dim=-1)
            yield MixerScan(u, F.linear(time_step, dt_proj), A, B, C, D, z, bias)
