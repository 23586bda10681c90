"""
Parts that sequence models share: input, block, pooling, classification head, recurrent cache.

Every model's folder has its own copy of this file, so that the folder can travel to the Hub by itself; the tests hold
the copies equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput


class RecurrentCache(Cache):
    """
    The state of every layer after the steps that a model has read, and how many steps these were.

    Args:
        num_hidden_layers (`int`): Number of layers.
    """

    # A cache without a fixed length: `generate` keeps the padding mask as it is, (batch, length).
    is_compileable = False

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * num_hidden_layers
        self.seen_steps = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of steps that the model has read."""
        return self.seen_steps

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen_steps = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences with the given indices, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the sequences with the given indices, in this order."""
        self.states = [s if s is None else s.index_select(0, indices.to(s.device)) for s in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.states = [s if s is None else s.repeat_interleave(repeats, dim=0) for s in self.states]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a recurrent state cannot forget its last steps."""
        raise NotImplementedError("A recurrent cache cannot be cropped: its states hold no single step. Start anew.")


class SequenceInput(nn.Module):
    """
    Tokens or real-valued steps to hidden states.

    Args:
        vocab_size (`int`, *optional*): Number of tokens.
        input_size (`int`, *optional*): Number of features of a real-valued step.
        hidden_size (`int`): Width of the hidden states.
    """

    def __init__(self, vocab_size: int | None, input_size: int | None, hidden_size: int) -> None:
        super().__init__()
        if vocab_size is None and input_size is None:
            raise ValueError(
                "The config has neither `vocab_size` nor `input_size`. Set `vocab_size` for a model that reads "
                "`input_ids`, or `input_size` for one that reads `input_values`."
            )
        self.embeddings = None if vocab_size is None else nn.Embedding(vocab_size, hidden_size)
        self.projection = None if input_size is None else nn.Linear(input_size, hidden_size)

    def forward(
        self, input_ids: Tensor | None, input_values: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """
        Hidden states of the one input that is given.

        Args:
            input_ids (`torch.LongTensor` of shape `(..., length)`): Tokens, or None.
            input_values (`torch.Tensor` of shape `(..., length, input_size)`): Real-valued steps, or None.
            inputs_embeds (`torch.Tensor` of shape `(..., length, hidden_size)`): Ready hidden states, or None.

        Returns:
            `torch.Tensor` of shape `(..., length, hidden_size)`.
        """
        require_one_input(input_ids=input_ids, input_values=input_values, inputs_embeds=inputs_embeds)
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is not None:
            if self.embeddings is None:
                raise ValueError("This model reads `input_values`: its config has no `vocab_size` for `input_ids`.")
            return self.embeddings(input_ids)
        if self.projection is None:
            raise ValueError("This model reads `input_ids`: its config has no `input_size` for `input_values`.")
        if input_values.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"`input_values` has shape {tuple(input_values.shape)}; its last axis must be the config's "
                f"`input_size`, {self.projection.in_features}."
            )
        return self.projection(input_values.to(self.projection.weight.dtype))


def require_one_input(**inputs: Tensor | None) -> None:
    """Raises `ValueError` unless exactly one of the inputs, given by their names, is not None."""
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one of {', '.join(inputs)}; given are {', '.join(given) or 'none'}.")


class MaskedBatchNorm(nn.BatchNorm1d):
    """
    Batch normalisation of `(batch, length, channels)` over all steps that are not padding.

    Gradient checkpointing runs a block a second time, inside the backward pass; the running statistics take part only
    the first time.
    """

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Normalise.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, channels)`): What is normalised.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
        """
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return hidden_states * scale + (self.bias - self.running_mean * scale)
        if mask is None or bool(mask.all()):
            return self._normalise(hidden_states.flatten(0, 1)).view_as(hidden_states)
        normalised = torch.zeros_like(hidden_states)
        normalised[mask] = self._normalise(hidden_states[mask]).to(hidden_states.dtype)
        return normalised

    def _normalise(self, rows: Tensor) -> Tensor:
        if rows.shape[0] < 2:
            raise ValueError(
                f"Batch normalisation needs at least 2 steps in a training batch, this one has {rows.shape[0]}. Use a "
                'larger batch, or `norm="layer"`.'
            )
        # With momentum 1, the statistics of this batch are written to the two tensors.
        mean, variance = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        normalised = F.batch_norm(rows, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        if not _inside_backward_pass():
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
                self.num_batches_tracked.add_(1)
        return normalised


def _inside_backward_pass() -> bool:
    """Whether autograd is running a backward pass on this thread: then a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class SequenceDropout(nn.Dropout):
    """Dropout of `(batch, length, channels)` that drops a channel at all steps of a sequence."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Drop channels in training."""
        if not self.training or self.p == 0:
            return hidden_states
        return hidden_states * F.dropout(torch.ones_like(hidden_states[:, :1]), self.p)


class SequenceBlock(GradientCheckpointingLayer):
    """
    Normalisation, mixer, GELU, dropout, GLU, dropout, residual: the block of LRU, S4D and S5.

    Args:
        mixer (`torch.nn.Module`): What mixes time; called with hidden states, mask and cache.
        hidden_size (`int`): Width.
        dropout (`float`): Dropout probability.
        norm (`str`): `"batch"` or `"layer"`.
        prenorm (`bool`): Whether to normalise the input; otherwise, the result.
    """

    def __init__(self, mixer: nn.Module, hidden_size: int, dropout: float, norm: str, prenorm: bool) -> None:
        super().__init__()
        self.norm = MaskedBatchNorm(hidden_size) if norm == "batch" else nn.LayerNorm(hidden_size)
        self.mixer = mixer
        self.glu = nn.Linear(hidden_size, 2 * hidden_size)
        self.dropout = SequenceDropout(dropout)
        self.prenorm = prenorm

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, cache: RecurrentCache | None = None) -> Tensor:
        """
        One block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): Input.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
            cache ([`RecurrentCache`], *optional*): States to go on from, and to be written to.
        """
        residual = hidden_states
        if self.prenorm:
            hidden_states = self._normalise(hidden_states, mask)
        hidden_states = self.mixer(hidden_states, mask, cache)
        hidden_states = self.dropout(F.gelu(hidden_states))
        hidden_states = residual + self.dropout(F.glu(self.glu(hidden_states), dim=-1))
        return hidden_states if self.prenorm else self._normalise(hidden_states, mask)

    def _normalise(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(self.norm, MaskedBatchNorm):
            return self.norm(hidden_states, mask)
        return self.norm(hidden_states)


def padding_mask(attention_mask: Tensor | None, steps: Tensor) -> Tensor | None:
    """
    The mask of the present steps, True where a step is not padding; None where none is given.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 where a step is not padding. While
            sequences are generated, it also covers the steps before the present ones.
        steps (`torch.Tensor` of shape `(batch, length, ...)`): The present steps.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`, or None.
    """
    if attention_mask is None:
        return None
    batch, length = steps.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; with {batch} sequences of {length} steps it "
            f"must be ({batch}, {length})."
        )
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


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
