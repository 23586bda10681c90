"""What replaces the convolution in front of a scan, in every family that has one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

import hf_compressm
from hf_compressm.architectures.scans import convolution as convolution_switch
from tests.cases import SELECTIVE_CASES, Case, case_id

STOCK = modeling_mamba2.causal_conv1d_fn


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    real = convolution_switch.causal_convolution

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(convolution_switch, "causal_convolution", counted)
    yield calls
    assert modeling_mamba2.causal_conv1d_fn is STOCK


def arguments(batch: int = 2, length: int = 9, channels: int = 6, taps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    projected = torch.randn(batch, length, channels + 3)
    return projected[..., 1 : channels + 1].mT, torch.randn(channels, taps), torch.randn(channels)


@pytest.mark.parametrize("activation", ["silu", "swish", None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_projection_is_filtered_where_it_lies(activation, with_bias, fused_calls) -> None:
    u, weight, bias = arguments()
    bias = bias if with_bias else None
    expected = modeling_mamba2.causal_conv1d_fn(u, weight, bias, activation=activation)
    with hf_compressm.fast_cpu_scan():
        found = modeling_mamba2.causal_conv1d_fn(u, weight, bias, activation=activation)
    assert fused_calls == [(2, 9, 6)]
    torch.testing.assert_close(found, expected)
    assert found.mT.is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 9])},
        {"initial_states": torch.zeros(2, 6, 3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_calls_are_for_the_stock_function(change, fused_calls) -> None:
    u, weight, bias = arguments()
    seen = []
    replaced = convolution_switch.convolution_replacement(lambda *args, **kwargs: seen.append((args, kwargs)))
    with hf_compressm.fast_cpu_scan():
        replaced(u, weight, bias, **change)
    assert not fused_calls
    assert seen == [((u, weight, bias), {"activation": None, **change})]


def test_what_lies_the_other_way_round_is_for_the_stock_function(fused_calls) -> None:
    u, weight, bias = arguments()
    with hf_compressm.fast_cpu_scan():
        modeling_mamba2.causal_conv1d_fn(u.contiguous(), weight, bias, activation="silu")
    modeling_mamba2.causal_conv1d_fn(u, weight, bias, activation="silu")
    assert not fused_calls


@pytest.mark.parametrize("case", SELECTIVE_CASES, ids=case_id)
def test_gradients_of_every_family_are_those_of_transformers(case: Case, fused_calls) -> None:
    gradients = []
    for fast in (False, True):
        model = case.build().train()
        with hf_compressm.fast_cpu_scan(fast):
            output = model(**case.batch())
            (output[0] if isinstance(output, tuple) else output.loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # The mixers of these have a forward pass of ours, and that of Zamba copies its input to the other layout.
    assert fused_calls or case.family in ("mamba", "falcon_mamba", "jamba", "zamba")
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name} differs by {float(error):.1e}"
