"""A tokenizer of 24 letters, for models with the vocabulary of `tests.cases`."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.cases import VOCABULARY


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, from a to x; words are single letters."""
    vocabulary = {chr(ord("a") + i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="x", eos_token="x", pad_token="x")
