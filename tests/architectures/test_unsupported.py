"""Recurrent layers that no family supports are named, and no others."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers, unsupported_note, unsupported_recurrent_layers
from hf_compressm.errors import UnsupportedModelError
from tests.cases import CASES, case_id, tiny_mamba2, token_batch


class KimiDeltaAttention(nn.Module):
    """What the layer of flash-linear-attention holds of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.A_log = nn.Linear(4, 8), nn.Parameter(torch.zeros(2))


class Mixture(nn.Module):
    """A Mamba-2 model with two layers of other kinds beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_mamba2()
        self.delta = KimiDeltaAttention()
        self.memory = nn.GRU(4, 4)

    def forward(self, **batch: torch.Tensor):
        return self.body(**batch)


def test_other_recurrences_are_found() -> None:
    model = Mixture()
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["body.backbone.layers.0.mixer", "body.backbone.layers.1.mixer"]
    found = unsupported_recurrent_layers(model, layers)
    assert found == {"delta": "KimiDeltaAttention", "memory": "GRU"}
    assert "2 recurrent layers" in unsupported_note(model, layers) and "memory" in unsupported_note(model, layers)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attention_experts_and_supported_layers_are_not_named(case) -> None:
    model = case.build()
    assert unsupported_note(model, find_layers(model)) is None


def test_compress_warns_and_leaves_them_alone(caplog) -> None:
    model = Mixture()
    before = {name: value.clone() for name, value in model.delta.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        record = compress(model, [token_batch()], CompreSSMConfig(strategy="fixed"))
    assert record.outcome == "cut" and "KimiDeltaAttention x1, GRU x1" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in model.delta.state_dict().items())


REASONS = [
    ("recurrent_gemma", {"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
     "RecurrentGemmaRglru", "one number a channel"),
    ("rwkv", {"attention_hidden_size": 16, "context_length": 32}, "RwkvSelfAttention", "one number a channel"),
    ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, "Lfm2ShortConv", "last inputs of a"),
]  # fmt: skip


@pytest.mark.parametrize("model_type, settings, name, reason", REASONS, ids=[row[0] for row in REASONS])
def test_layers_without_a_state_size_say_why(model_type: str, settings: dict, name: str, reason: str) -> None:
    common = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common, **settings))
    assert set(unsupported_recurrent_layers(model, []).values()) == {name}
    with pytest.raises(UnsupportedModelError, match=f"{name}: .*{reason}"):
        find_layers(model)


class Mamba3(nn.Module):
    """What mamba-ssm's layer of that name holds of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 20), nn.Linear(8, 4)
        self.B_bias, self.C_bias = nn.Parameter(torch.ones(2, 1, 4)), nn.Parameter(torch.ones(2, 1, 4))


def test_mamba_3_says_why() -> None:
    with pytest.raises(UnsupportedModelError, match="Mamba3: its B and C turn in pairs"):
        find_layers(nn.Sequential(Mamba3()))


def test_kimi_delta_attention_of_other_packages_says_why() -> None:
    with pytest.raises(
        UnsupportedModelError, match="KimiDeltaAttention: .*only the layers that come with transformers"
    ):
        find_layers(nn.Sequential(KimiDeltaAttention()))
