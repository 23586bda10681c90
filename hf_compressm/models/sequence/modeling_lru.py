"""PyTorch LRU model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_lru import LRUConfig
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
    from hf_compressm.ops import diagonal_recurrence
except ImportError:
    diagonal_recurrence = None


class LRU(nn.Module):
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
        # Long recurrences need the digits of float32, also under autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            recurrence = _recurrence_by_products if diagonal_recurrence is None else diagonal_recurrence
            output, state = recurrence(hidden_states, *self.system(), state)
        if cache is not None:
            cache.states[self.layer_idx] = state
        return output + hidden_states * self.D.to(hidden_states.dtype)


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


class LRUPreTrainedModel(PreTrainedModel):
    """
    What all LRU models share: initial values, and how they are saved and loaded.

    Args:
        config ([`LRUConfig`]): Sizes and settings.
    """

    config: LRUConfig
    config_class = LRUConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["SequenceBlock"]
    _keep_in_fp32_modules_strict = ["nu_log", "theta_log", "gamma_log"]
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: LRUConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # The Trainer counts the tokens of this input.
        self.main_input_name = "input_values" if config.vocab_size is None else "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LRU):
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


class LRUModel(LRUPreTrainedModel):
    """
    Blocks of linear recurrent units, without a head.

    Args:
        config ([`LRUConfig`]): Sizes and settings.
    """

    def __init__(self, config: LRUConfig) -> None:
        super().__init__(config)
        self.embeddings = SequenceInput(config.vocab_size, config.input_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SequenceBlock(LRU(config, layer_idx), config.hidden_size, config.dropout, config.norm, config.prenorm)
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


class LRUForSequenceClassification(SequenceClassification, LRUPreTrainedModel):
    """
    An LRU with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    Args:
        config ([`LRUConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    def __init__(self, config: LRUConfig) -> None:
        super().__init__(config)
        self.backbone = LRUModel(config)
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


class LRUForCausalLM(LRUPreTrainedModel, GenerationMixin):
    """
    An LRU with a language modeling head.

    Args:
        config ([`LRUConfig`]): Sizes and settings, with a `vocab_size`.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.embeddings.weight"}

    def __init__(self, config: LRUConfig) -> None:
        if config.vocab_size is None:
            raise ValueError("A language model reads tokens: set `vocab_size` in the config.")
        super().__init__(config)
        self.backbone = LRUModel(config)
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


__all__ = ["LRUForCausalLM", "LRUForSequenceClassification", "LRUModel", "LRUPreTrainedModel"]
