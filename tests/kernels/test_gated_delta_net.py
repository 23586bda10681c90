"""Gated DeltaNet of transformers on fla's kernels gives what its torch path gives, after a cut to either form."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from tests.kernel_paths import homes, torch_path

from ..delta_rule_models import VOCABULARY, delta_layers, tiny_delta_rule_model, tiny_gated_delta_net

# Before and after the cut; values have 12 entries, and one chunk of 64 steps is full.
STATES, KEPT, LENGTH = 20, 12, 70
CUT = CompreSSMConfig(strategy="fixed", keep_ratio=KEPT / STATES)


def modeling(name: str):
    """The module of transformers with a family's classes."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    assert torch.isfinite(one).all() and (one - other).abs().max() <= tolerance * other.abs().max()


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one row."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def agrees_with_the_torch_path(model: nn.Module, name: str) -> None:
    loss, gradients = run(model)
    with torch_path(modeling(name)):
        close(loss, run(model)[0])
        close(gradients, run(model)[1], 1e-3)


@pytest.fixture(params=[True, False], ids=["stock", "mixed"])
def stock(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_transformers_runs_the_kernels(name: str) -> None:
    found = homes(modeling(name))
    assert {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"} <= found.keys()
    assert all(found[key] == "fla" for key in found if "delta_rule" in key), found


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_a_cut_model(name: str, stock: bool) -> None:
    model = tiny_gated_delta_net(name, STATES, linear_value_head_dim=12)
    twin = copy.deepcopy(model)
    config = CompreSSMConfig(**{**vars(CUT), "stock": stock})
    records = [compress(model, [batch()], config)]
    with torch_path(modeling(name)):
        records.append(compress(twin, [batch()], config))
    assert [record.outcome for record in records] == ["cut", "cut"]
    assert all(hasattr(layer, "input_mixing") is not stock for layer in delta_layers(model))
    agrees_with_the_torch_path(model, name)
