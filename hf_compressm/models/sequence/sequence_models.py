"""The models around a mixer with a recurrent state, as LRU and S4D are: backbone, classifier, language model."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .recurrent_cache import CACHE_NAME, RecurrentCache
from .sequence_blocks import SequenceBlock
from .sequence_classification import ClassificationHead, SequenceClassification
from .sequence_inputs import SequenceInput, padding_mask


class SequencePreTrainedModel(PreTrainedModel):
    """
    What all models around a mixer share: initial values, and how they are saved and loaded.

    Args:
        config (`transformers.PreTrainedConfig`): Sizes and settings.
    """

    mixer_class: ClassVar[type[nn.Module]]
    """What mixes time; built with the config and the number of its layer, and sets its own initial values."""

    base_model_prefix = "backbone"
    _no_split_modules = ["SequenceBlock"]
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: Any, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # The Trainer counts the tokens of this input.
        self.main_input_name = "input_values" if config.vocab_size is None else "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, self.mixer_class):
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


class SequenceBackbone:
    """
    Blocks of mixers, without a head; to be mixed into a [`SequencePreTrainedModel`].

    Args:
        config (`transformers.PreTrainedConfig`): Sizes and settings.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = SequenceInput(config.vocab_size, config.input_size, config.hidden_size)
        block = (config.hidden_size, config.dropout, config.norm, config.prenorm)
        self.layers = nn.ModuleList(
            SequenceBlock(self.mixer_class(config, layer_idx), *block) for layer_idx in range(config.num_hidden_layers)
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
        cache: RecurrentCache | None = None,
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
                States after the steps before these; written to. The name of `cache` before transformers 5.24.
            use_cache (`bool`, *optional*):
                Whether to return the states; by default as in the config, and never in training.
            output_hidden_states (`bool`, *optional*):
                Whether to return what enters each block, and the result of the last.
            return_dict (`bool`, *optional*):
                Whether to return an output object instead of a tuple.
            cache ([`RecurrentCache`], *optional*):
                States after the steps before these; written to.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`] or `tuple`.
        """
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False
        cache = past_key_values if cache is None else cache
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
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            **{CACHE_NAME: cache if use_cache else None},
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


class SequenceClassifier(SequenceClassification):
    """
    A backbone with pooling over time and a linear head; to be mixed into a [`SequencePreTrainedModel`].

    Args:
        config (`transformers.PreTrainedConfig`): Sizes and settings; `num_labels` is the number of classes.
    """

    backbone_class: ClassVar[type[SequencePreTrainedModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = self.backbone_class(config)
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


class SequenceCausalLM:
    """
    A backbone with a language modeling head; to be mixed into a [`SequencePreTrainedModel`].

    Args:
        config (`transformers.PreTrainedConfig`): Sizes and settings, with a `vocab_size`.
    """

    backbone_class: ClassVar[type[SequencePreTrainedModel]]

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.embeddings.weight"}

    def __init__(self, config: Any) -> None:
        if config.vocab_size is None:
            raise ValueError("A language model reads tokens: set `vocab_size` in the config.")
        super().__init__(config)
        self.backbone = self.backbone_class(config)
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
        cache: RecurrentCache | None = None,
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
                States after the steps before these; written to. The name of `cache` before transformers 5.24.
            use_cache (`bool`, *optional*):
                Whether to return the states; by default as in the config, and never in training.
            logits_to_keep (`int`, *optional*, defaults to 0):
                Number of last steps whose scores are computed; 0 for all.
            output_hidden_states (`bool`, *optional*):
                Whether to return what enters each block, and the result of the last.
            return_dict (`bool`, *optional*):
                Whether to return an output object instead of a tuple.
            cache ([`RecurrentCache`], *optional*):
                States after the steps before these; written to.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`] or `tuple`.
        """
        output = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=past_key_values if cache is None else cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE_NAME: getattr(output, CACHE_NAME)}
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()
