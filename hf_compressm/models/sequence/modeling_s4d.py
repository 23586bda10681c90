"""PyTorch S4D model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_s4d import S4DConfig
from .sequence_blocks import (
    ClassificationHead,
    RecurrentCache,
    SequenceBlock,
    SequenceClassification,
    SequenceInput,
    padding_mask,
)

# This file also runs where the library is not installed: it travels to the Hub with the weights.
try:
    from hf_compressm.ops import channel_systems
except ImportError:
    channel_systems = None


class S4D(nn.Module):
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

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, cache: RecurrentCache | None = None) -> Tensor:
        """
        Apply the layer to a batch of sequences.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, H)`): Input.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
            cache ([`RecurrentCache`], *optional*): States to go on from, and to be written to.
        """
        if mask is not None:
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
        state = None if cache is None else cache.states[self.layer_idx]
        # Long sequences need the digits of float32, also under autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            systems = _systems_by_convolution if channel_systems is None else channel_systems
            output, state = systems(hidden_states, *self.system(), state, return_state=cache is not None)
        if cache is not None:
            cache.states[self.layer_idx] = state
        return output + hidden_states * self.D.to(hidden_states.dtype)


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


class S4DPreTrainedModel(PreTrainedModel):
    """
    What all S4D models share: initial values, and how they are saved and loaded.

    Args:
        config ([`S4DConfig`]): Sizes and settings.
    """

    config: S4DConfig
    config_class = S4DConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["SequenceBlock"]
    _keep_in_fp32_modules_strict = ["log_dt", "A_real_log", "A_imag"]
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: S4DConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # The Trainer counts the tokens of this input.
        self.main_input_name = "input_values" if config.vocab_size is None else "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, S4D):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
        else:
            super()._init_weights(module)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` must not make a cache of keys and values: the model makes its own in the first step.
        return False


class S4DModel(S4DPreTrainedModel):
    """
    Blocks of S4D layers, without a head.

    Args:
        config ([`S4DConfig`]): Sizes and settings.
    """

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(config)
        self.embeddings = SequenceInput(config.vocab_size, config.input_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SequenceBlock(S4D(config, layer_idx), config.hidden_size, config.dropout, config.norm, config.prenorm)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The token embedding; None in a model that reads `input_values`."""
        return self.embeddings.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embeddings.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """
        Hidden states of every step.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokens.
            input_values (`torch.Tensor` of shape `(batch, length, input_size)`, *optional*):
                Real-valued steps, instead of tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 where a step counts and 0 where it is padding, on the left or on the right.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*):
                Ready hidden states, instead of tokens or values.
            past_key_values ([`RecurrentCache`], *optional*):
                States after the steps before these; written to.
            use_cache (`bool`, *optional*):
                Whether to return the states; by default as in the config, and never in training.
            output_hidden_states (`bool`, *optional*):
                Whether to return what enters each block, and the result of the last.
            return_dict (`bool`, *optional*):
                Whether to return an output object instead of a tuple.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`] or `tuple`.
        """
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False
        cache = past_key_values
        if use_cache and cache is None:
            cache = RecurrentCache(len(self.layers))
        hidden_states = self.embeddings(input_ids, input_values, inputs_embeds)
        mask = padding_mask(attention_mask, hidden_states)
        all_hidden_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, cache)
            all_hidden_states.append(hidden_states)
        if cache is not None:
            cache.seen_steps += hidden_states.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


class S4DForSequenceClassification(SequenceClassification, S4DPreTrainedModel):
    """
    An S4D model with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    Args:
        config ([`S4DConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(config)
        self.backbone = S4DModel(config)
        self.head = ClassificationHead(config.hidden_size, config.num_labels, config.paired_inputs)
        self.post_init()

    def encode(self, input_ids, input_values, inputs_embeds, attention_mask, output_hidden_states):
        """
        Last hidden states and, where they are asked for, all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Tokens, or None.
            input_values (`torch.Tensor` of shape `(batch, length, input_size)`): Real-valued steps, or None.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`): Ready hidden states, or None.
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 where a step is not padding, or None.
            output_hidden_states (`bool`): Whether to return the hidden states of all blocks.
        """
        output = self.backbone(
            input_ids,
            input_values,
            attention_mask,
            inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return output.last_hidden_state, output.hidden_states


class S4DForCausalLM(S4DPreTrainedModel, GenerationMixin):
    """
    An S4D model with a language modeling head.

    Args:
        config ([`S4DConfig`]): Sizes and settings, with a `vocab_size`.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.embeddings.weight"}

    def __init__(self, config: S4DConfig) -> None:
        if config.vocab_size is None:
            raise ValueError("A language model reads tokens: set `vocab_size` in the config.")
        super().__init__(config)
        self.backbone = S4DModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | CausalLMOutputWithPast:
        """
        Scores of the next token at every step, and the loss where labels are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 where a step counts and 0 where it is padding; pad on the left to generate.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The tokens themselves: they are shifted inside. -100 does not count.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*):
                Ready hidden states, instead of tokens.
            past_key_values ([`RecurrentCache`], *optional*):
                States after the steps before these; written to.
            use_cache (`bool`, *optional*):
                Whether to return the states; by default as in the config, and never in training.
            logits_to_keep (`int`, *optional*, defaults to 0):
                Number of last steps whose scores are computed; 0 for all.
            output_hidden_states (`bool`, *optional*):
                Whether to return what enters each block, and the result of the last.
            return_dict (`bool`, *optional*):
                Whether to return an output object instead of a tuple.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`] or `tuple`.
        """
        output = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


__all__ = ["S4DForCausalLM", "S4DForSequenceClassification", "S4DModel", "S4DPreTrainedModel"]
