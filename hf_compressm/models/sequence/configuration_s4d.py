"""Configuration of S4D."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_validation import SequenceSettings


@strict
class S4DConfig(SequenceSettings, PreTrainedConfig):
    r"""
    Configuration of an S4D model, with blocks of normalisation, S4D layer, GELU, dropout, GLU, dropout and residual.

    Source: Gu et al., 2022, "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv
    2206.11893).

    Args:
        vocab_size (`int`, *optional*):
            Number of tokens, for models that read `input_ids`.
        input_size (`int`, *optional*):
            Number of features of each step, for models that read `input_values`.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the blocks, and number of channels, each with a system of its own.
        state_size (`int` or `list[int]`, *optional*, defaults to 32):
            Number of complex states of each channel; a list has one number for each layer. Every state stands for a
            conjugate pair, so this is half of the paper's N.
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
        init (`str`, *optional*, defaults to `"lin"`):
            Poles at the start: `"lin"`, `"inv"` or `"real"`, the paper's S4D-Lin, S4D-Inv and S4D-Real.
        discretization (`str`, *optional*, defaults to `"zoh"`):
            How continuous time becomes steps: `"zoh"` (zero-order hold) or `"bilinear"`.
        dt_min (`float`, *optional*, defaults to 0.001):
            Smallest time step of a channel at the start.
        dt_max (`float`, *optional*, defaults to 0.1):
            Largest time step of a channel at the start.
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
    >>> from hf_compressm.models.sequence import S4DConfig, S4DForSequenceClassification
    >>> config = S4DConfig(input_size=1, hidden_size=8, state_size=[16, 4], num_hidden_layers=2, num_labels=10)
    >>> S4DForSequenceClassification(config).num_parameters()
    1098

    ```
    """

    model_type = "s4d"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int | None = None
    input_size: int | None = None
    hidden_size: int = 128
    state_size: int | list[int] = 32
    num_hidden_layers: int = 6
    dropout: float = 0.1
    norm: str = "batch"
    prenorm: bool = True
    pooling: str = "mean"
    paired_inputs: bool = False
    init: str = "lin"
    discretization: str = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.require_settings(init=("lin", "inv", "real"), discretization=("zoh", "bilinear"))
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"`dt_min` is {self.dt_min} and `dt_max` is {self.dt_max}; allowed is 0 < dt_min <= dt_max."
            )
        super().__post_init__(**kwargs)


__all__ = ["S4DConfig"]
