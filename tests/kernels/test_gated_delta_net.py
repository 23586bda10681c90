"""Gated DeltaNet of transformers on fla's kernels is measured, cut and run as on its torch path, in either form."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from tests.kernel_paths import close, homes, torch_path

from ..delta_rule_models import VOCABULARY, delta_layers, tiny_gated_delta_net

# Entries of keys before and after the cut; of values; and steps, which do not fill a chunk of 64.
STATES, KEPT, VALUES, LENGTH = 20, 12, 10, 40
NAMES = ["qwen3_next", "qwen3_5", "olmo_hybrid"]
CHUNKS, STEP = "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "fused_recurrent_gated_delta_rule_fwd_kernel"


def modeling(name: str) -> ModuleType:
    """The module of transformers with a family's classes."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one row."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def agrees_with_the_torch_path(model: nn.Module, name: str) -> None:
    loss, gradients = run(model)
    with torch_path(modeling(name)):
        expected_loss, expected_gradients = run(model)
    close(loss, expected_loss, 1e-5)
    close(gradients, expected_gradients, 1e-4)


def config(stock: bool) -> CompreSSMConfig:
    # Otherwise this library's own rule would stand in the place of the kernels.
    return CompreSSMConfig(strategy="fixed", keep_ratio=KEPT / STATES, stock=stock, fast_cpu_scan=False)


@pytest.mark.parametrize("name", [*NAMES, "kimi_linear", "glm5_next"])
def test_transformers_runs_the_kernels(name: str) -> None:
    """Otherwise every other test here would pass on its torch path."""
    found = homes(modeling(name))
    assert {home for key, home in found.items() if "delta" in key} == {"fla"}, found


# Both forms and all families, without all pairs of them.
@pytest.mark.parametrize(
    ("name", "stock"), [("qwen3_next", True), ("qwen3_5", False), ("olmo_hybrid", False)], ids=NAMES
)
def test_a_cut_and_its_model_are_those_of_the_torch_path(name: str, stock: bool, launched: Counter[str]) -> None:
    model = tiny_gated_delta_net(name, STATES, linear_value_head_dim=VALUES)
    twin = copy.deepcopy(model)
    there = compress(model, [batch()], config(stock))
    assert launched[CHUNKS] > 0
    launched.clear()
    with torch_path(modeling(name)):
        here = compress(twin, [batch()], config(stock))
    assert not launched
    assert here.outcome == there.outcome == "cut"
    assert there.loss_before == pytest.approx(here.loss_before, rel=1e-5)
    assert there.loss_after == pytest.approx(here.loss_after, rel=1e-3)
    for one, other in zip(here.layers, there.layers, strict=True):
        largest = one.hankel_singular_values[0]
        assert other.hankel_singular_values == pytest.approx(one.hankel_singular_values, rel=1e-3, abs=1e-5 * largest)
    assert all(hasattr(layer, "input_mixing") is not stock for layer in delta_layers(model))
    agrees_with_the_torch_path(model, name)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "mixed"])
def test_single_steps_continue_a_sequence(stock: bool, launched: Counter[str]) -> None:
    model = tiny_gated_delta_net("qwen3_5", STATES, linear_value_head_dim=VALUES)
    with torch_path(modeling("qwen3_5")):
        assert compress(model, [batch()], config(stock)).outcome == "cut"
    tokens = batch()["input_ids"]
    with torch.no_grad():
        whole = model(tokens).logits
        cache, steps = model(tokens[:, : LENGTH - 3], use_cache=True).past_key_values, []
        for t in range(LENGTH - 3, LENGTH):
            steps.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert launched[STEP] == 3 * len(delta_layers(model))
    close(torch.cat(steps, 1), whole[:, -3:], 1e-4)
