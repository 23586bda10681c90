"""The small models of the benchmarks of Mamba-2 and its relatives, and the data that they are trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import PIXELS, VOCABULARY, augmented, digit_sequences  # noqa: E402

STATE_SIZE = 64
TEXT_LENGTH = 128
_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Two state-space layers each; the hybrids have an attention layer between them.
_ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def _mamba2(state_size: int, **settings: Any) -> PreTrainedModel:
    config = Mamba2Config(
        num_hidden_layers=2,
        state_size=state_size,
        head_dim=16,
        num_heads=settings["hidden_size"] // 8,
        n_groups=1,
        chunk_size=65,
        **settings,
    )
    return Mamba2ForCausalLM(config)


def _falcon_mamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = FalconMambaConfig(num_hidden_layers=2, state_size=state_size, time_step_rank=4, **settings)
    return FalconMambaForCausalLM(config)


def _jamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = JambaConfig(
        mamba_d_state=state_size, mamba_dt_rank=4, attn_layer_period=3, attn_layer_offset=1, num_experts=1,
        num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1, **_ATTENTION, **settings,
    )  # fmt: skip
    return JambaForCausalLM(config)


def _bamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = BambaConfig(
        mamba_d_state=state_size, mamba_n_heads=settings["hidden_size"] // 8, mamba_d_head=16, mamba_n_groups=1,
        mamba_chunk_size=65, attn_layer_indices=[1], **_ATTENTION, **settings,
    )  # fmt: skip
    return BambaForCausalLM(config)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "mamba2": _mamba2,
    "falcon_mamba": _falcon_mamba,
    "jamba": _jamba,
    "bamba": _bamba,
}


def make_model(family: str, state_size: int = STATE_SIZE, vocabulary: int = VOCABULARY, width: int = 32):
    """A stock causal model of one of the `FAMILIES`, with the weights that torch's present seed gives."""
    return FAMILIES[family](state_size, vocab_size=vocabulary, hidden_size=width, **_NO_SPECIAL_TOKENS)


@dataclass(frozen=True)
class Task:
    """
    What a model is trained on and judged by.

    Args:
        train (`datasets.Dataset`): Rows with `input_ids` and `labels`.
        judge (`Callable`): Takes a model and returns its figure on the test set.
        figure (`str`): What that figure is: test accuracy (higher is better) or perplexity (lower is better).
        vocabulary (`int`): Number of different tokens.
    """

    train: Dataset
    judge: Callable[[PreTrainedModel], float]
    figure: str
    vocabulary: int


def digits_task() -> Task:
    """The 8x8 digits of scikit-learn read pixel by pixel; the figure is the test accuracy of the class token."""
    train, test = digit_sequences()
    train.set_transform(augmented)
    tokens, classes = test["input_ids"][:][:, :PIXELS], test["labels"][:][:, PIXELS]

    def accuracy(model: PreTrainedModel) -> float:
        logits = _logits(model, tokens)
        return (logits[:, -1].argmax(-1) == classes).float().mean().item()

    return Task(train, accuracy, "test accuracy", VOCABULARY)


def text_task(files: Sequence[str], test_rows: int = 256) -> Task:
    """
    Bytes of text files in pieces of 128; the figure is the perplexity per byte of the last pieces, kept for the test.

    Args:
        files (`Sequence[str]`): Paths of text files.
        test_rows (`int`, *optional*, defaults to 256): Pieces that the test takes.
    """
    text = "\n".join(load_dataset("text", data_files=list(files), split="train")["text"])
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    pieces = data[: len(data) // TEXT_LENGTH * TEXT_LENGTH].reshape(-1, TEXT_LENGTH)
    train = Dataset.from_dict({"input_ids": pieces[:-test_rows].numpy(), "labels": pieces[:-test_rows].numpy()})
    test = pieces[-test_rows:]

    def perplexity(model: PreTrainedModel) -> float:
        logits = _logits(model, test)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).exp().item()

    return Task(train.with_format("torch"), perplexity, "test perplexity per byte", 256)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in tokens.split(120)])
