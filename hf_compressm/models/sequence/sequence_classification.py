"""What sequence classifiers share: pooling over time, their head and their forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .sequence_inputs import padding_mask, require_one_input


def pool_sequence(hidden_states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """
    One vector for each sequence, from the steps that are not padding.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, channels)`): What a model's last block returns.
        mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
        pooling (`str`): `"mean"`, `"last"` or `"max"`.

    Returns:
        `torch.Tensor` of shape `(batch, channels)`.
    """
    if mask is None:
        if pooling == "mean":
            return hidden_states.mean(1)
        return hidden_states[:, -1] if pooling == "last" else hidden_states.amax(1)
    if pooling == "mean":
        weights = mask.to(hidden_states.dtype)
        return torch.einsum("blc,bl->bc", hidden_states, weights) / weights.sum(1, keepdim=True).clamp_min(1)
    if pooling == "max":
        return hidden_states.masked_fill(~mask.unsqueeze(-1), torch.finfo(hidden_states.dtype).min).amax(1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (steps * mask).amax(1)
    return hidden_states[torch.arange(mask.shape[0], device=mask.device), last]


class ClassificationHead(nn.Module):
    """
    Class scores of a sequence, or of a pair of sequences.

    Two vectors are compared through themselves, their product and their difference, with one hidden layer.

    Args:
        hidden_size (`int`): Width of a sequence's vector.
        num_labels (`int`): Number of classes.
        paired_inputs (`bool`): Whether vectors come in pairs.
    """

    def __init__(self, hidden_size: int, num_labels: int, paired_inputs: bool) -> None:
        super().__init__()
        self.compare = nn.Linear(4 * hidden_size, hidden_size) if paired_inputs else None
        self.score = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """`(batch, hidden_size)`, or `(batch, 2, hidden_size)` for pairs, to `(batch, num_labels)`."""
        if self.compare is not None:
            first, second = pooled.unbind(1)
            pooled = F.gelu(self.compare(torch.cat([first, second, first * second, first - second], dim=-1)))
        return self.score(pooled)


class SequenceClassification:
    """
    The forward pass of all sequence classifiers, to be mixed into a `PreTrainedModel`.

    The class has a `head` ([`ClassificationHead`]) and a method `encode(input_ids, input_values, inputs_embeds,
    attention_mask, output_hidden_states)` that returns the last hidden states and, where they are asked for, all.
    """

    # The loss is a mean over the batch, whatever the Trainer knows of its other batches.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | SequenceClassifierOutput:
        """
        Class scores, and the loss where labels are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokens; `(batch, 2, length)` for a model with `paired_inputs`, as all arguments before the labels.
            input_values (`torch.Tensor` of shape `(batch, length, input_size)`, *optional*):
                Real-valued steps, instead of tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 where a step counts and 0 where it is padding, on the left or on the right.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*):
                Classes, or numbers where `num_labels` is 1.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*):
                Ready hidden states, instead of tokens or values.
            output_hidden_states (`bool`, *optional*):
                Whether to return what enters each block, and the result of the last.
            return_dict (`bool`, *optional*):
                Whether to return an output object instead of a tuple.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`] or `tuple`.
        """
        if self.config.paired_inputs:
            unpaired = [input_ids, input_values, inputs_embeds, attention_mask]
            input_ids, input_values, inputs_embeds, attention_mask = (_flatten_pairs(tensor) for tensor in unpaired)
        require_one_input(input_ids=input_ids, input_values=input_values, inputs_embeds=inputs_embeds)
        given = next(tensor for tensor in (input_ids, input_values, inputs_embeds) if tensor is not None)
        mask = padding_mask(attention_mask, given)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states, all_hidden_states = self.encode(
            input_ids, input_values, inputs_embeds, attention_mask, output_hidden_states
        )
        pooled = pool_sequence(hidden_states, mask, self.config.pooling)
        logits = self.head(pooled.unflatten(0, (-1, 2)) if self.config.paired_inputs else pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=all_hidden_states)
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


def _flatten_pairs(tensor: Tensor | None) -> Tensor | None:
    """(batch, 2, ...) to (2 batch, ...)."""
    if tensor is None:
        return None
    if tensor.ndim < 3 or tensor.shape[1] != 2:
        raise ValueError(
            f"A model with `paired_inputs` reads two sequences, stacked on a second axis of length 2; the shape of an "
            f"input is {tuple(tensor.shape)}."
        )
    return tensor.flatten(0, 1)
