"""Tiny models of every class of `hf_compressm.models`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compressm.models import (
    LRUConfig,
    LRUForCausalLM,
    LRUForSequenceClassification,
    Mamba2ClassifierConfig,
    Mamba2ForSequenceClassification,
    MambaClassifierConfig,
    MambaForSequenceClassification,
    S4DConfig,
    S4DForCausalLM,
    S4DForSequenceClassification,
)

VOCABULARY = 11
FEATURES = 2
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_labels": 3}


@dataclass(frozen=True)
class Tiny:
    """One class and the settings that make it small."""

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A model in evaluation mode; it reads tokens unless `input_size` is given."""
        torch.manual_seed(seed)
        inputs = {} if "input_size" in overrides else {"vocab_size": VOCABULARY}
        return self.model(self.config(**{**SIZES, **self.settings, **inputs, **overrides})).eval()


MAMBA2 = {"head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 16}
CLASSIFIERS = [
    Tiny("lru", LRUConfig, LRUForSequenceClassification),
    Tiny("s4d", S4DConfig, S4DForSequenceClassification),
    Tiny("mamba", MambaClassifierConfig, MambaForSequenceClassification),
    Tiny("mamba2", Mamba2ClassifierConfig, Mamba2ForSequenceClassification, MAMBA2),
]
LANGUAGE_MODELS = [Tiny("lru", LRUConfig, LRUForCausalLM), Tiny("s4d", S4DConfig, S4DForCausalLM)]


def name_of(tiny: Tiny) -> str:
    """The name that pytest shows."""
    return tiny.name


def sequences(kind: str, *shape: int) -> dict[str, Tensor]:
    """Random inputs of a kind, `"input_ids"` or `"input_values"`; the last number is the length."""
    if kind == "input_ids":
        return {kind: torch.randint(0, VOCABULARY, shape)}
    return {kind: torch.randn(*shape, FEATURES)}


def reading(kind: str) -> dict[str, Any]:
    """Settings of a model that reads a kind of input."""
    return {"vocab_size": VOCABULARY} if kind == "input_ids" else {"input_size": FEATURES}
