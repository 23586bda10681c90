"""Recurrent layers that no family supports are named, and no others."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers, unsupported_note, unsupported_recurrent_layers
from tests.cases import CASES, case_id, tiny_mamba2, token_batch


class Mixture(nn.Module):
    """A Mamba-2 model with two layers of other kinds beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_mamba2()
        sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        self.delta = Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=16, **sizes), layer_idx=0)
        self.memory = nn.GRU(4, 4)

    def forward(self, **batch: torch.Tensor):
        return self.body(**batch)


def test_other_recurrences_are_found() -> None:
    model = Mixture()
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["body.backbone.layers.0.mixer", "body.backbone.layers.1.mixer"]
    found = unsupported_recurrent_layers(model, layers)
    assert found == {"delta": "Qwen3NextGatedDeltaNet", "memory": "GRU"}
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
    assert record.outcome == "cut" and "Qwen3NextGatedDeltaNet x1, GRU x1" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in model.delta.state_dict().items())
