"""Sequence classifiers on the Mamba and Mamba-2 of transformers."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import Mamba2Model, Mamba2PreTrainedModel, MambaModel, MambaPreTrainedModel
from transformers import initialization as init

from .configuration_mamba_classifiers import Mamba2ClassifierConfig, MambaClassifierConfig
from .sequence_classification import ClassificationHead, SequenceClassification
from .sequence_inputs import SequenceInput


class _Classifier(SequenceClassification):
    """What both classifiers share; the backbone's parameters have the names that they have in a causal model."""

    _no_split_modules = ["MambaBlock", "Mamba2Block"]

    def _build(self, backbone_class: type[nn.Module]) -> None:
        config = self.config
        self.main_input_name = "input_values" if config.vocab_size is None else "input_ids"
        self.backbone = _backbone(backbone_class, config)
        self.embeddings = None
        if config.input_size is not None:
            self.embeddings = SequenceInput(None, config.input_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.head = ClassificationHead(config.hidden_size, config.num_labels, config.paired_inputs)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ClassificationHead, SequenceInput)):
            # These are not part of the backbone, whose spread would be too small or too large for them.
            for linear in (part for part in module.modules() if isinstance(part, nn.Linear)):
                init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
                init.zeros_(linear.bias)

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
        if input_ids is not None and self.config.vocab_size is None:
            raise ValueError("This model reads `input_values`: its config has no `vocab_size` for `input_ids`.")
        if input_values is not None:
            if self.embeddings is None:
                raise ValueError("This model reads `input_ids`: its config has no `input_size` for `input_values`.")
            inputs_embeds = self.embeddings(None, input_values)
        output = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return output.last_hidden_state, output.hidden_states


def _backbone(backbone_class: type[nn.Module], config: MambaClassifierConfig | Mamba2ClassifierConfig) -> nn.Module:
    """A backbone on the config itself, whose sizes may change later; without tokens, it has no embedding."""
    if config.vocab_size is None and config.input_size is None:
        raise ValueError(
            "The config has neither `vocab_size` nor `input_size`. Set `vocab_size` for a model that reads "
            "`input_ids`, or `input_size` for one that reads `input_values`."
        )
    if config.vocab_size is not None:
        return backbone_class(config)
    config.vocab_size = 1
    try:
        backbone = backbone_class(config)
    finally:
        config.vocab_size = None
    backbone.set_input_embeddings(None)
    return backbone


class MambaForSequenceClassification(_Classifier, MambaPreTrainedModel):
    """
    A Mamba with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    A checkpoint of a causal Mamba gives the backbone its weights: `from_pretrained` with this class.

    Args:
        config ([`MambaClassifierConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    config: MambaClassifierConfig
    config_class = MambaClassifierConfig

    def __init__(self, config: MambaClassifierConfig) -> None:
        super().__init__(config)
        self._build(MambaModel)


class Mamba2ForSequenceClassification(_Classifier, Mamba2PreTrainedModel):
    """
    A Mamba-2 with pooling over time and a linear head; with `paired_inputs`, for two sequences.

    A checkpoint of a causal Mamba-2 gives the backbone its weights: `from_pretrained` with this class.

    Args:
        config ([`Mamba2ClassifierConfig`]): Sizes and settings; `num_labels` is the number of classes.
    """

    config: Mamba2ClassifierConfig
    config_class = Mamba2ClassifierConfig

    def __init__(self, config: Mamba2ClassifierConfig) -> None:
        super().__init__(config)
        self._build(Mamba2Model)


__all__ = ["Mamba2ForSequenceClassification", "MambaForSequenceClassification"]
