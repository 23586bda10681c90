"""Gated DeltaNet on flash-linear-attention's kernels gives what our CPU rule gives, before and after a cut.

Skipped where there is no GPU or no fla, and where causal-conv1d is not hidden, whose kernels transformers takes on a
CPU too.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress, enable_fast_cpu_scan

from ..delta_rule_models import VOCABULARY, delta_layers, tiny_gated_delta_net


def is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not is_there("fla") or is_there("causal_conv1d"),
    reason="needs a GPU, fla and no causal-conv1d",
)

# The kernels multiply in TF32 or bfloat16.
TOLERANCE = 3e-2


@pytest.fixture(autouse=True)
def _our_rule_on_the_cpu() -> None:
    """transformers would call fla there, which has no kernels for it; the scans are put back after each test."""
    enable_fast_cpu_scan()


def batch(length: int = 96) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def on_the_gpu(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to("cuda")


def agree(here: torch.Tensor, there: torch.Tensor) -> None:
    assert torch.isfinite(there).all()
    assert (here - there.cpu()).norm() <= TOLERANCE * here.norm()


def cut(name: str, stock: bool, size: int) -> torch.nn.Module:
    model = tiny_gated_delta_net(name, 64, linear_value_head_dim=32)
    config = CompreSSMConfig(strategy="fixed", keep_ratio=size / 64, stock=stock)
    assert compress(model, [batch()], config).outcome == "cut"
    assert all(hasattr(layer, "input_mixing") is not stock for layer in delta_layers(model))
    return model


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "mixed"])
# fla works in blocks of 64; neither of these fills one, and 24 is no power of two.
@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_loss_and_gradients_of_a_cut_model(name: str, size: int, stock: bool) -> None:
    here = cut(name, stock, size)
    there = on_the_gpu(here)
    losses = [model(**{key: value.to(model.device) for key, value in batch().items()}).loss for model in (here, there)]
    agree(losses[0].detach(), losses[1].detach())
    losses[0].backward()
    try:
        losses[1].backward()
    except RuntimeError as error:
        if "incorrect results" not in str(error):
            raise
        pytest.skip(f"fla does not trust this Triton on this GPU: {error}")
    pairs = [(one.grad, other.grad) for one, other in zip(here.parameters(), there.parameters())]
    agree(*(torch.cat([pair[i].flatten().cpu() for pair in pairs if pair[0] is not None]) for i in range(2)))


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "mixed"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_single_steps_continue_a_sequence(name: str, stock: bool) -> None:
    there = on_the_gpu(cut(name, stock, 16)).eval()
    tokens = batch(70)["input_ids"].cuda()
    with torch.no_grad():
        whole = there(tokens).logits
        cache, steps = there(tokens[:, :64], use_cache=True).past_key_values, []
        for t in range(64, 70):
            steps.append(there(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    agree(whole[:, 64:].cpu(), torch.cat(steps, 1))


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid"])
def test_a_cut_on_the_gpu_loses_what_one_on_the_cpu_loses(name: str) -> None:
    records = []
    for device in ("cpu", "cuda"):
        model = tiny_gated_delta_net(name, 64, linear_value_head_dim=32).to(device)
        records.append(compress(model, [batch()], CompreSSMConfig(strategy="fixed", keep_ratio=0.5)))
    assert [record.outcome for record in records] == ["cut", "cut"]
    assert records[1].loss_before == pytest.approx(records[0].loss_before, rel=TOLERANCE)
    assert records[1].loss_after == pytest.approx(records[0].loss_after, rel=TOLERANCE)
