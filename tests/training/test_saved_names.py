"""Checkpoints whose tensors have other names on disk than in memory, loaded as the Trainer loads them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import load_sharded_checkpoint

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.training.resume import follow_checkpoints
from tests.cases import tiny_mamba, token_batch
from tests.delta_rule_models import (
    GATED_CONFIGS,
    KIMI_CONFIGS,
    SEEING_CONFIGS,
    tiny_gated_delta_net,
    tiny_kimi_delta,
    tiny_seeing_model,
)

MODELS = [
    *((tiny_gated_delta_net, family, stock) for family in GATED_CONFIGS for stock in (False, True)),
    *((tiny_kimi_delta, family, False) for family in KIMI_CONFIGS),
    *((tiny_seeing_model, family, False) for family in SEEING_CONFIGS),
    (tiny_seeing_model, "qwen3_5", True),
]


@pytest.mark.parametrize("in_files", [False, True], ids=["one file", "several files"])
@pytest.mark.parametrize("build, family, stock", MODELS)
def test_every_tensor_is_read(build, family: str, stock: bool, in_files: bool, tmp_path) -> None:
    saved, other = build(family, seed=1), build(family, seed=2)
    compress(saved, [token_batch()], CompreSSMConfig(state_size=4, stock=stock))
    saved.save_pretrained(tmp_path, max_shard_size="20KB" if in_files else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == in_files
    follow_checkpoints(other)
    if in_files:
        load_sharded_checkpoint(other, tmp_path, strict=False)
    else:
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert [layer.form for layer in find_layers(other)] == [layer.form for layer in find_layers(saved)]
    for name, tensor in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_state_dict_with_the_models_names_is_left_alone() -> None:
    saved, other = tiny_gated_delta_net("olmo_hybrid", seed=1), tiny_gated_delta_net("olmo_hybrid", seed=2)
    follow_checkpoints(other)
    other.load_state_dict(saved.state_dict())
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())


def test_what_cannot_be_read_is_left_to_the_load() -> None:
    model = tiny_mamba()
    follow_checkpoints(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {f"other.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    report = model.load_state_dict(tensors, strict=False)
    assert set(report.unexpected_keys) == set(tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
