"""Configurations of the sequence classifiers on Mamba and Mamba-2."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config, MambaConfig

from .configuration_validation import LARGEST_STATE_SIZE, require_choices, require_counts, require_dropout


@strict
class MambaClassifierConfig(MambaConfig):
    r"""
    A `MambaConfig` with what a sequence classifier needs beside it.

    Args:
        vocab_size (`int`, *optional*):
            Number of tokens, for models that read `input_ids`.
        input_size (`int`, *optional*):
            Number of features of each step, for models that read `input_values`.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the pooled hidden state.
        pooling (`str`, *optional*, defaults to `"mean"`):
            How a sequence is summed up: `"mean"`, `"last"` or `"max"` over the steps that are not padding.
        paired_inputs (`bool`, *optional*, defaults to `False`):
            Whether two sequences are compared, given on a dimension of length 2 behind the batch.
        pad_token_id (`int`, *optional*):
            Token that fills sequences up; it matters only together with an `attention_mask`.
        bos_token_id (`int`, *optional*):
            Token that begins a sequence.
        eos_token_id (`int` or `list[int]`, *optional*):
            Tokens that end a sequence.

    Raises:
        `ValueError`: a setting is out of its range.
    """

    model_type = "mamba_classifier"

    vocab_size: int | None = None
    input_size: int | None = None
    dropout: float = 0.0
    pooling: str = "mean"
    paired_inputs: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        _require_valid(self)
        super().__post_init__(**kwargs)


@strict
class Mamba2ClassifierConfig(Mamba2Config):
    r"""
    A `Mamba2Config` with what a sequence classifier needs beside it.

    Args:
        vocab_size (`int`, *optional*):
            Number of tokens, for models that read `input_ids`.
        input_size (`int`, *optional*):
            Number of features of each step, for models that read `input_values`.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the pooled hidden state.
        pooling (`str`, *optional*, defaults to `"mean"`):
            How a sequence is summed up: `"mean"`, `"last"` or `"max"` over the steps that are not padding.
        paired_inputs (`bool`, *optional*, defaults to `False`):
            Whether two sequences are compared, given on a dimension of length 2 behind the batch.
        pad_token_id (`int`, *optional*):
            Token that fills sequences up; it matters only together with an `attention_mask`.
        bos_token_id (`int`, *optional*):
            Token that begins a sequence.
        eos_token_id (`int` or `list[int]`, *optional*):
            Tokens that end a sequence.

    Raises:
        `ValueError`: a setting is out of its range.
    """

    model_type = "mamba2_classifier"

    vocab_size: int | None = None
    input_size: int | None = None
    dropout: float = 0.0
    pooling: str = "mean"
    paired_inputs: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        _require_valid(self)
        super().__post_init__(**kwargs)


def _require_valid(config: MambaClassifierConfig | Mamba2ClassifierConfig) -> None:
    require_counts(config, "vocab_size", "input_size", "hidden_size", "num_hidden_layers")
    if not 1 <= config.state_size <= LARGEST_STATE_SIZE:
        raise ValueError(f"`state_size` is {config.state_size}; allowed are 1 to {LARGEST_STATE_SIZE}.")
    require_choices(config, pooling=("mean", "last", "max"))
    require_dropout(config)


__all__ = ["Mamba2ClassifierConfig", "MambaClassifierConfig"]
