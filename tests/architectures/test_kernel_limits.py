"""State sizes that causal-conv1d's kernels refuse: rounded up where these kernels run, and told elsewhere."""

from __future__ import annotations

import logging

import pytest

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers, refused_size, size_multiple
from hf_compressm.compression.decide import chosen
from tests.cases import tiny_mamba, token_batch
from tests.delta_rule_models import tiny_gated_delta_net
from tests.selective_models import tiny_mamba2

# Sizes for which the stock form would have 4 heads x 8 + 2 sides x 2 groups x 13 = 84 channels.
CONFIG = {"strategy": "fixed", "keep_ratio": 0.8, "stock": True, "minimum_reduction": 0.0}


def channels(model) -> set[int]:
    return {layer.module.conv1d.out_channels for layer in find_layers(model)}


@pytest.mark.parametrize(
    ("model", "multiple"),
    [
        (tiny_mamba2(16), 2),  # two groups of B and of C: four channels a state
        (tiny_mamba2(16, n_groups=1), 4),
        (tiny_mamba(), 1),  # its convolution has no states
        (tiny_gated_delta_net("qwen3_5", 8), 2),  # 24 channels of v, two key heads of q and of k
        (tiny_gated_delta_net("qwen3_5", 8, linear_value_head_dim=5), 1),  # 20 channels of v: refused at half of sizes
    ],
)
def test_the_sizes_that_the_kernels_take(model, multiple: int) -> None:
    layer = find_layers(model)[0]
    assert size_multiple(layer) == multiple


def test_a_size_that_they_refuse_and_one_that_they_take() -> None:
    layer = find_layers(tiny_mamba2(16))[0]
    assert "has 84 channels" in refused_size(layer, 13) and "multiple_of=2" in refused_size(layer, 13)
    assert refused_size(layer, 14) is None
    # What they do not take now is no reason to warn.
    assert refused_size(find_layers(tiny_mamba2(15))[0], 13) is None


def test_sizes_are_rounded_up_where_the_kernels_run(monkeypatch) -> None:
    model = tiny_mamba2(16)
    monkeypatch.setattr(chosen, "runs_on_kernels", lambda layer: True)
    assert compress(model, [token_batch()], CompreSSMConfig(**CONFIG)).outcome == "cut"
    assert model.config.state_size == 14 and channels(model) == {88}


def test_a_target_stays_and_elsewhere_a_warning_tells(monkeypatch, caplog) -> None:
    model = tiny_mamba2(16)
    with caplog.at_level(logging.WARNING):
        compress(model, [token_batch()], CompreSSMConfig(**CONFIG))
    assert channels(model) == {84} and "takes multiples of 8 only" in caplog.text
    monkeypatch.setattr(chosen, "runs_on_kernels", lambda layer: True)
    model = tiny_mamba2(16)
    compress(model, [token_batch()], CompreSSMConfig(strategy="target", target_state_size=13, stock=True))
    assert model.config.state_size == 13


def test_a_mixed_cut_leaves_the_convolution_as_it_is(caplog) -> None:
    model = tiny_mamba2(16)
    before = channels(model)
    with caplog.at_level(logging.WARNING):
        compress(model, [token_batch()], CompreSSMConfig(**{**CONFIG, "stock": False}))
    assert channels(model) == before and "multiples of 8" not in caplog.text
