"""PyTorch LRU model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init

from .configuration_lru import LRUConfig
from .sequence_blocks import RecurrentMixer
from .sequence_models import SequenceBackbone, SequenceCausalLM, SequenceClassifier, SequencePreTrainedModel

# This file also runs where the library is not installed: it travels to the Hub with the weights.
try:
    from hf_compressm.ops import diagonal_recurrence
except ImportError:
    diagonal_recurrence = None


class LRU(RecurrentMixer):
    r"""
    Linear recurrent unit.

    \\( h_t = \lambda \odot h_{t-1} + e^\gamma \odot B u_t, y_t = \mathrm{Re}(C h_t) + D \odot u_t \\) with
    \\( \lambda = e^{-e^\nu + i e^\theta} \\). Complex parameters are real tensors with real and imaginary part on a
    last axis of length 2.

    Args:
        config ([`LRUConfig`]): Sizes and settings.
        layer_idx (`int`): Place of the layer in the model, and in its cache.
    """

    # Trained with a learning rate of their own and without weight decay.
    state_space_parameters = ("nu_log", "theta_log", "gamma_log", "B")

    def __init__(self, config: LRUConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size = hidden_size = config.hidden_size
        self.state_size = state_size = config.state_sizes[layer_idx]
        self.nu_log = nn.Parameter(torch.empty(state_size))
        self.theta_log = nn.Parameter(torch.empty(state_size))
        self.gamma_log = nn.Parameter(torch.empty(state_size))
        self.B = nn.Parameter(torch.empty(state_size, hidden_size, 2))
        self.C = nn.Parameter(torch.empty(hidden_size, state_size, 2))
        self.D = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self) -> None:
        """Draw the published initial values: poles uniform on a ring, gamma for states of the power of the input."""
        r_min, r_max, max_phase = self.config.r_min, self.config.r_max, self.config.max_phase
        radius, phase = torch.rand(2, self.state_size, device=self.nu_log.device)
        # Neither angle nor log-radius may be zero: their logarithms are the parameters.
        square = (radius * (r_max**2 - r_min**2) + r_min**2).clamp_min(1e-12)
        init.copy_(self.nu_log, torch.log(-0.5 * torch.log(square)))
        init.copy_(self.theta_log, torch.log(max_phase * phase.clamp_min(1e-7)))
        init.copy_(self.gamma_log, 0.5 * torch.log1p(-square))
        init.normal_(self.B, std=1 / math.sqrt(2 * self.hidden_size))
        init.normal_(self.C, std=1 / math.sqrt(self.state_size))
        init.normal_(self.D)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """`lam` (N,), `B` (N, H) with gamma in it, and `C` (H, N), complex128."""
        # The decay of a slow pole is the distance of |lam| from 1, of which float32 would keep few digits.
        radius = torch.exp(-torch.exp(self.nu_log.double()))
        lam = torch.polar(radius, torch.exp(self.theta_log.double()))
        B = self.B.double() * torch.exp(self.gamma_log.double())[:, None, None]
        return lam, torch.view_as_complex(B), torch.view_as_complex(self.C.double())

    def recurrence(self, u: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """
        Run the recurrence without the feedthrough D.

        Args:
            u (`torch.Tensor` of shape `(batch, length, H)`): Input.
            state (`torch.Tensor` of shape `(batch, N)`, *optional*): The state to go on from.
            return_state (`bool`): Whether the last state is asked for; it comes for free.
        """
        recurrence = _recurrence_by_products if diagonal_recurrence is None else diagonal_recurrence
        return recurrence(u, *self.system(), state)


def _recurrence_by_products(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """What `hf_compressm.ops.diagonal_recurrence` computes, in plain torch and with more memory."""
    batch, length, n = *u.shape[:2], lam.shape[0]
    n_chunks = -(-length // chunk)
    dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    lam, B, C = lam.to(dtype), B.to(dtype), C.to(dtype)
    drive = u.to(dtype) @ B.mT
    drive = nn.functional.pad(drive, (0, 0, 0, n_chunks * chunk - length)).view(batch, n_chunks, chunk, n)
    steps = torch.arange(chunk, device=u.device)
    lag = steps.unsqueeze(-1) - steps
    powers = lam.unsqueeze(-1) ** torch.arange(chunk + 1, device=u.device)
    # Inside a chunk, the states are one product with the powers of lam; between chunks, a loop.
    inside = torch.einsum("nts,bcsn->bctn", torch.where(lag >= 0, powers[:, lag.clamp_min(0)], 0), drive)
    state = lam.new_zeros(batch, n) if state is None else state
    before = []
    for c in range(n_chunks):
        before.append(state)
        state = inside[:, c, -1] + powers[:, chunk] * state
    states = inside + powers[:, 1:].mT * torch.stack(before, dim=1).unsqueeze(2)
    states = states.flatten(1, 2)[:, :length]
    return (states @ C.mT).real.to(u.dtype), states[:, -1]


class LRUPreTrainedModel(SequencePreTrainedModel):
    """
    What all LRU models share: initial values, and how they are saved and loaded.

    Args:
        config ([`LRUConfig`]): Sizes and settings.
    """

    config: LRUConfig
    config_class = LRUConfig
    mixer_class = LRU
    _keep_in_fp32_modules_strict = ["nu_log", "theta_log", "gamma_log"]


class LRUModel(SequenceBackbone, LRUPreTrainedModel):
    """
    Blocks of linear recurrent units, without a head.

    Args:
        config ([`LRUConfig`]): Sizes and settings.
    """


class LRUForSequenceClassification(SequenceClassifier, LRUPreTrainedModel):
    """
    An LRU with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    Args:
        config ([`LRUConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    backbone_class = LRUModel


class LRUForCausalLM(SequenceCausalLM, LRUPreTrainedModel, GenerationMixin):
    """
    An LRU with a language modeling head.

    Args:
        config ([`LRUConfig`]): Sizes and settings, with a `vocab_size`.
    """

    backbone_class = LRUModel


__all__ = ["LRUForCausalLM", "LRUForSequenceClassification", "LRUModel", "LRUPreTrainedModel"]
