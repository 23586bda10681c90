"""Configuration of the LRU."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_validation import SequenceSettings


@strict
class LRUConfig(SequenceSettings, PreTrainedConfig):
    r"""
    Configuration of an LRU model, with blocks of normalisation, linear recurrent unit, GELU, dropout, GLU, dropout and
    residual.

    Source: Orvieto et al., 2023, "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349).

    Args:
        vocab_size (`int`, *optional*):
            Number of tokens, for models that read `input_ids`.
        input_size (`int`, *optional*):
            Number of features of each step, for models that read `input_values`.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the blocks, and number of inputs and outputs of each recurrence.
        state_size (`int` or `list[int]`, *optional*, defaults to 256):
            Number of complex states of each layer's recurrence; a list has one number for each layer.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Number of blocks.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout after GELU and after GLU; a channel is dropped at all steps of a sequence at once.
        norm (`str`, *optional*, defaults to `"batch"`):
            `"batch"` or `"layer"`.
        prenorm (`bool`, *optional*, defaults to `True`):
            Whether a block normalises its input; otherwise, what leaves its residual connection.
        pooling (`str`, *optional*, defaults to `"mean"`):
            How a classifier sums a sequence up: `"mean"`, `"last"` or `"max"` over the steps that are not padding.
        paired_inputs (`bool`, *optional*, defaults to `False`):
            Whether a classifier compares two sequences, given on a dimension of length 2 behind the batch.
        r_min (`float`, *optional*, defaults to 0.9):
            Smallest absolute value of a pole at the start.
        r_max (`float`, *optional*, defaults to 0.999):
            Largest absolute value of a pole at the start, below 1.
        max_phase (`float`, *optional*, defaults to 6.2832):
            Largest angle of a pole at the start, in radians.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its states for generation, outside of training.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the language modeling head is the transposed embedding.
        pad_token_id (`int`, *optional*):
            Token that fills sequences up; it matters only together with an `attention_mask`.
        bos_token_id (`int`, *optional*):
            Token that begins a generated sequence.
        eos_token_id (`int` or `list[int]`, *optional*):
            Tokens that end a generated sequence.

    Raises:
        `ValueError`: a setting is out of its range, or `state_size` has not one number for each layer.

    Example:

    ```python
    >>> from hf_compressm.models.sequence import LRUConfig, LRUForSequenceClassification
    >>> config = LRUConfig(input_size=1, hidden_size=8, state_size=[16, 4], num_hidden_layers=2, num_labels=10)
    >>> LRUForSequenceClassification(config).num_parameters()
    1142

    ```
    """

    model_type = "lru"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int | None = None
    input_size: int | None = None
    hidden_size: int = 128
    state_size: int | list[int] = 256
    num_hidden_layers: int = 6
    dropout: float = 0.1
    norm: str = "batch"
    prenorm: bool = True
    pooling: str = "mean"
    paired_inputs: bool = False
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 6.2832
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.require_settings()
        if not 0 <= self.r_min < self.r_max < 1:
            raise ValueError(f"`r_min` is {self.r_min} and `r_max` is {self.r_max}; allowed is 0 <= r_min < r_max < 1.")
        if not 0 < self.max_phase <= 6.2832:
            raise ValueError(f"`max_phase` is {self.max_phase}; allowed are angles above 0, up to 6.2832.")
        super().__post_init__(**kwargs)


__all__ = ["LRUConfig"]
