"""What sequence models read: tokens or real-valued steps, and the mask of their padding."""

from __future__ import annotations

from torch import Tensor, nn


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
