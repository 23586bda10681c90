"""PyTorch S4D model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init

from .configuration_s4d import S4DConfig
from .sequence_blocks import RecurrentMixer
from .sequence_models import SequenceBackbone, SequenceCausalLM, SequenceClassifier, SequencePreTrainedModel

# This file also runs where the library is not installed: it travels to the Hub with the weights.
try:
    from hf_compressm.ops import channel_systems
except ImportError:
    channel_systems = None


class S4D(RecurrentMixer):
    r"""
    S4D layer: a single-input, single-output system \\( \dot h = A \odot h + 1 u, y = 2 \mathrm{Re}(C h) + D u \\) in
    each channel, with diagonal \\( A = -e^{A_{real}} + i A_{imag} \\), discretised with the channel's time step.

    The input weight is 1: only its product with the readout C matters. The readout is a real tensor with real and
    imaginary part on a last axis of length 2.

    Args:
        config ([`S4DConfig`]): Sizes and settings.
        layer_idx (`int`): Place of the layer in the model, and in its cache.
    """

    # Trained with a learning rate of their own and without weight decay.
    state_space_parameters = ("log_dt", "A_real_log", "A_imag")

    def __init__(self, config: S4DConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size = hidden_size = config.hidden_size
        self.state_size = state_size = config.state_sizes[layer_idx]
        self.discretization = config.discretization
        self.log_dt = nn.Parameter(torch.empty(hidden_size))
        self.A_real_log = nn.Parameter(torch.empty(hidden_size, state_size))
        self.A_imag = nn.Parameter(torch.empty(hidden_size, state_size))
        self.C = nn.Parameter(torch.empty(hidden_size, state_size, 2))
        self.D = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self) -> None:
        """Set the published initial values: poles of S4D-Lin, S4D-Inv or S4D-Real, time steps uniform in their log."""
        initial_poles, dt_min, dt_max = self.config.init, self.config.dt_min, self.config.dt_max
        n = torch.arange(self.state_size, dtype=torch.float64, device=self.log_dt.device)
        real, imag = torch.full_like(n, 0.5), math.pi * n
        if initial_poles == "inv":
            full_size = 2 * self.state_size
            imag = full_size / math.pi * (full_size / (2 * n + 1) - 1)
        elif initial_poles == "real":
            real, imag = n + 1, torch.zeros_like(n)
        init.copy_(self.A_real_log, torch.log(real).expand_as(self.A_real_log))
        init.copy_(self.A_imag, imag.expand_as(self.A_imag))
        init.uniform_(self.log_dt, math.log(dt_min), math.log(dt_max))
        init.normal_(self.C, std=math.sqrt(0.5))
        init.normal_(self.D)

    def system(self) -> tuple[Tensor, Tensor]:
        """Discrete poles, and readouts for input weight 1 with the conjugate states in them: (H, N), complex128."""
        # In float32, lam - 1 would lose most digits of a slow pole.
        A = torch.complex(-torch.exp(self.A_real_log.double()), self.A_imag.double())
        dt = torch.exp(self.log_dt.double()).unsqueeze(-1)
        C = 2 * torch.view_as_complex(self.C.double())
        if self.discretization == "bilinear":
            return (2 + dt * A) / (2 - dt * A), C * (2 * dt / (2 - dt * A))
        lam = torch.exp(dt * A)
        return lam, C * ((lam - 1) / A)

    def recurrence(self, u: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """
        Run the channels' systems without the feedthrough D.

        Args:
            u (`torch.Tensor` of shape `(batch, length, H)`): Input.
            state (`torch.Tensor` of shape `(batch, H, N)`, *optional*): The states to go on from.
            return_state (`bool`): Whether the last states are asked for.
        """
        systems = _systems_by_convolution if channel_systems is None else channel_systems
        return systems(u, *self.system(), state, return_state=return_state)


def _systems_by_convolution(
    u: Tensor, lam: Tensor, C: Tensor, state: Tensor | None = None, return_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """What `hf_compressm.ops.channel_systems` computes, with more memory: all powers of the poles, (H, N, length)."""
    length, dtype = u.shape[1], torch.complex128 if u.dtype == torch.float64 else torch.complex64
    signal = u.to(dtype.to_real()).transpose(1, 2)
    powers = (lam.unsqueeze(-1) ** torch.arange(length + 1, device=u.device)).to(dtype)
    C = C.to(dtype)
    kernel = torch.einsum("hn,hnl->hl", C, powers[..., :length]).real
    spectrum = torch.fft.rfft(signal, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    if state is not None:
        y = y + torch.einsum("hn,bhn,hnl->bhl", C, state, powers[..., 1:]).real
    y = y.transpose(1, 2).to(u.dtype)
    if not return_state:
        return y, None
    last = torch.einsum("bhl,hnl->bhn", signal.to(dtype), powers[..., :length].flip(-1))
    return y, last if state is None else last + powers[..., -1] * state


class S4DPreTrainedModel(SequencePreTrainedModel):
    """
    What all S4D models share: initial values, and how they are saved and loaded.

    Args:
        config ([`S4DConfig`]): Sizes and settings.
    """

    config: S4DConfig
    config_class = S4DConfig
    mixer_class = S4D
    _keep_in_fp32_modules_strict = ["log_dt", "A_real_log", "A_imag"]


class S4DModel(SequenceBackbone, S4DPreTrainedModel):
    """
    Blocks of S4D layers, without a head.

    Args:
        config ([`S4DConfig`]): Sizes and settings.
    """


class S4DForSequenceClassification(SequenceClassifier, S4DPreTrainedModel):
    """
    An S4D model with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    Args:
        config ([`S4DConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    backbone_class = S4DModel


class S4DForCausalLM(SequenceCausalLM, S4DPreTrainedModel, GenerationMixin):
    """
    An S4D model with a language modeling head.

    Args:
        config ([`S4DConfig`]): Sizes and settings, with a `vocab_size`.
    """

    backbone_class = S4DModel


__all__ = ["S4DForCausalLM", "S4DForSequenceClassification", "S4DModel", "S4DPreTrainedModel"]
