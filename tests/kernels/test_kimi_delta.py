"""Kimi delta attention of transformers on fla's kernels is measured, cut and run as on its torch path."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from tests.kernel_paths import close, torch_path

from ..delta_rule_models import tiny_kimi_delta, tiny_seeing_model
from .test_gated_delta_net import LENGTH, agrees_with_the_torch_path, batch, modeling

N, KEPT = 8, 5
# Otherwise this library's own rule would stand in the place of the kernels.
CONFIG = CompreSSMConfig(strategy="target", target_state_size=KEPT, fast_cpu_scan=False)
# Ling, uncut, has gradients there that differ by more than this from those of its torch path: its decays are strong.
FAMILIES = {"kimi_linear": tiny_kimi_delta, "glm5_next": tiny_seeing_model}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_and_its_model_are_those_of_the_torch_path(name: str, launched: Counter[str]) -> None:
    """Keys of fewer entries than values, and decays of their own: nothing but the sizes of what the kernels get."""
    model = FAMILIES[name](name)
    twin = copy.deepcopy(model)
    there = compress(model, [batch()], CONFIG, progress=False)
    assert any("kda" in kernel for kernel in launched), launched
    launched.clear()
    with torch_path(modeling(name)):
        here = compress(twin, [batch()], CONFIG, progress=False)
    assert not launched
    assert here.outcome == there.outcome == "cut"
    assert there.loss_before == pytest.approx(here.loss_before, rel=1e-5)
    assert there.loss_after == pytest.approx(here.loss_after, rel=1e-3)
    for one, other in zip(here.layers, there.layers, strict=True):
        largest = one.hankel_singular_values[0]
        assert other.hankel_singular_values == pytest.approx(one.hankel_singular_values, rel=1e-3, abs=1e-5 * largest)
    assert [layer.form for layer in find_layers(model)] == [(KEPT, N)] * 2
    agrees_with_the_torch_path(model, name)


def test_single_steps_continue_a_sequence(launched: Counter[str]) -> None:
    model = tiny_kimi_delta("kimi_linear")
    with torch_path(modeling("kimi_linear")):
        assert compress(model, [batch()], CONFIG, progress=False).outcome == "cut"
    tokens = batch()["input_ids"]
    launched.clear()
    with torch.no_grad():
        whole = model(tokens).logits
        cache, steps = model(tokens[:, : LENGTH - 3], use_cache=True).past_key_values, []
        for t in range(LENGTH - 3, LENGTH):
            steps.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert sum(count for kernel, count in launched.items() if "recurrent" in kernel) == 3 * 2, launched
    close(torch.cat(steps, 1), whole[:, -3:], 1e-4)
