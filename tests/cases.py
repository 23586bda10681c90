"""The one table of families: a tiny model of each, and a batch for it. A new family adds a row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel, PreTrainedModel

from hf_compressm.architectures import find_layers
from hf_compressm.models import LRUConfig, LRUForCausalLM, S4DConfig, S4DForSequenceClassification

from .delta_rule_models import GATED_CONFIGS, tiny_gated_delta_net
from .lightning_models import tiny_minimax
from .selective_models import (
    VOCABULARY,
    tiny_bamba,
    tiny_falcon_h1,
    tiny_falcon_mamba,
    tiny_granite_moe_hybrid,
    tiny_jamba,
    tiny_mamba2,
    tiny_nemotron_h,
    tiny_zamba,
    tiny_zamba2,
)

SELECTIVE = ("interpolative", "selection")
SELECTION = ("selection",)
TIME_INVARIANT = ("balanced", "selection")


@dataclass(frozen=True)
class Case:
    """
    A family's tiny model.

    Those that are not trained everywhere stand in for no way of training that another family does not stand for; tests
    of single features of a training run leave them out.
    """

    name: str
    family: str
    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    layers: int = 2
    state_size: int = 8
    is_pretrained_model: bool = True
    is_trained_everywhere: bool = True
    reductors: tuple[str, ...] = SELECTIVE


def token_batch(batch: int = 4, length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with themselves as labels."""
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def tiny_mamba_config(state_size: int = 8, **overrides) -> MambaConfig:
    """A Mamba of a few thousand parameters."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": state_size,
        "time_step_rank": 3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return MambaConfig(**{**settings, **overrides})


def tiny_mamba(state_size: int = 8, seed: int = 0, **overrides) -> MambaForCausalLM:
    """A stock Mamba with time steps large enough for its states to differ."""
    torch.manual_seed(seed)
    return MambaForCausalLM(tiny_mamba_config(state_size, time_step_min=0.05, time_step_max=0.5, **overrides))


class ModelWithMambaInside(nn.Module):
    """A user's own module around a `MambaModel`; it is no `PreTrainedModel` and returns a tuple."""

    def __init__(self, state_size: int = 8) -> None:
        super().__init__()
        self.encode = nn.Linear(1, 16)
        self.body = MambaModel(tiny_mamba_config(state_size))
        self.head = nn.Linear(16, 3)

    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.head(self.body(inputs_embeds=self.encode(input_values)).last_hidden_state.mean(1))
        if labels is None:
            return (logits,)
        return nn.functional.cross_entropy(logits, labels), logits


def real_valued_model(state_size: int = 8, seed: int = 0) -> nn.Module:
    """A Mamba inside a module, for real sequences."""
    torch.manual_seed(seed)
    return ModelWithMambaInside(state_size)


def real_valued_batch(batch: int = 4, length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Random real sequences with one class each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_values": torch.randn(batch, length, 1, generator=generator),
        "labels": torch.randint(0, 3, (batch,), generator=generator),
    }


def tiny_lru(state_size: int = 8, seed: int = 0, **overrides) -> LRUForCausalLM:
    """An LRU language model whose states forget quickly, so that they differ on short sequences."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": state_size}
    return LRUForCausalLM(LRUConfig(**{**settings, "r_min": 0.3, "r_max": 0.9, "dropout": 0.0, **overrides}))


def tiny_s4d(state_size: int = 8, seed: int = 0, **overrides) -> S4DForSequenceClassification:
    """An S4D classifier of real-valued sequences."""
    torch.manual_seed(seed)
    settings = {"input_size": 1, "hidden_size": 16, "num_hidden_layers": 2, "state_size": state_size, "num_labels": 3}
    return S4DForSequenceClassification(S4DConfig(**{**settings, "dropout": 0.0, **overrides}))


CASES = [
    Case("mamba-causal-lm", "mamba", tiny_mamba, token_batch),
    Case("mamba-inside-a-module", "mamba", real_valued_model, real_valued_batch, is_pretrained_model=False),
    Case("lru-causal-lm", "lru", tiny_lru, token_batch, reductors=TIME_INVARIANT),
    Case("s4d-classifier", "s4d", tiny_s4d, real_valued_batch, reductors=TIME_INVARIANT),
    Case("mamba2", "mamba2", tiny_mamba2, token_batch, reductors=SELECTION),
    Case("jamba", "jamba", tiny_jamba, token_batch, reductors=SELECTION),
    *(
        Case(build.__name__.removeprefix("tiny_"), family, build, token_batch, reductors=reductors,
             is_trained_everywhere=False)
        for family, build, reductors in [
            ("falcon_mamba", tiny_falcon_mamba, SELECTION),
            ("zamba", tiny_zamba, SELECTIVE),
            ("zamba2", tiny_zamba2, SELECTION),
            ("bamba", tiny_bamba, SELECTION),
            ("falcon_h1", tiny_falcon_h1, SELECTION),
            ("granite_moe_hybrid", tiny_granite_moe_hybrid, SELECTION),
            ("nemotron_h", tiny_nemotron_h, SELECTION),
        ]
    ),
    *(
        Case(family, family, functools.partial(tiny_gated_delta_net, family), token_batch, reductors=SELECTION,
             is_trained_everywhere=family == "qwen3_5")
        for family in GATED_CONFIGS
    ),
]  # fmt: skip

PRETRAINED_CASES = [case for case in CASES if case.is_pretrained_model]
SELECTIVE_CASES = [case for case in CASES if case.reductors != TIME_INVARIANT]
# The delta rule has no means over time that make it a time-invariant system.
AVERAGED_CASES = [case for case in SELECTIVE_CASES if case.family not in GATED_CONFIGS]
# No stock class holds it cut, so tests of stock models leave it out.
MIXED_ONLY = Case("minimax", "minimax", tiny_minimax, token_batch, reductors=())
TRAINED_CASES = [*(case for case in CASES if case.is_trained_everywhere), MIXED_ONLY]


def size_in_config(model: PreTrainedModel) -> int | list[int]:
    """The state size that the config of a model tells, by whatever name the family has for it."""
    layer = find_layers(model)[0]
    return getattr(model.config, layer.stock.config_size_name if layer.is_selective else "state_size")


def case_id(case: Case) -> str:
    """The name that pytest shows."""
    return case.name


def logits_of(model: PreTrainedModel | nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits in evaluation mode."""
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]
