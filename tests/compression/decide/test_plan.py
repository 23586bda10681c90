"""Spectra to sizes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import plan_reduction
from hf_compressm.compression.decide.progress import Stage
from hf_compressm.errors import ConfigurationError


def spectrum(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


STEEP = spectrum(100, 10, 1, 0.1, 0.01, 0.001, 0.0001, 0.00001)
FLAT = torch.ones(8, dtype=torch.float64)


def new_sizes(spectra: dict, config: CompreSSMConfig) -> dict[str, int]:
    plan = plan_reduction(spectra, {name: len(sigma) for name, sigma in spectra.items()}, config)
    return {name: layer.new_size for name, layer in plan.items()}


def test_uniform_takes_the_size_of_the_most_demanding_layer() -> None:
    config = CompreSSMConfig(tolerance=0.005)
    assert new_sizes({"a": STEEP, "b": spectrum(100, 10, 1, 0.9, 0.8, 0.01, 0.001, 0)}, config) == {"a": 5, "b": 5}
    plan = plan_reduction({"a": STEEP}, {"a": 8}, config)
    assert plan["a"].wanted == plan["a"].new_size == 3 and plan["a"].is_cut


def test_one_flat_layer_keeps_all_layers_whole() -> None:
    assert new_sizes({"a": STEEP, "b": FLAT}, CompreSSMConfig(tolerance=0.01)) == {"a": 8, "b": 8}


def test_without_uniform_each_layer_follows_its_own_spectrum() -> None:
    assert new_sizes({"a": STEEP, "b": FLAT}, CompreSSMConfig(tolerance=0.005, uniform=False)) == {"a": 3, "b": 8}


@pytest.mark.parametrize("gate, expected", [(0.0, 19), (0.05, 19), (0.051, 20), (0.5, 20)])
def test_the_gate_needs_a_share_of_reduction(gate: float, expected: int) -> None:
    sigma = torch.ones(20, dtype=torch.float64)
    sigma[-1] = 1e-9
    assert new_sizes({"a": sigma}, CompreSSMConfig(tolerance=0.01, minimum_reduction=gate)) == {"a": expected}


def test_fixed_keeps_a_share_whatever_the_spectrum_says() -> None:
    assert new_sizes({"a": FLAT}, CompreSSMConfig(strategy="fixed", keep_ratio=0.3)) == {"a": 3}


@pytest.mark.parametrize(
    "settings, expected", [({"multiple_of": 4}, 4), ({"min_state_size": 6}, 6), ({"multiple_of": 5}, 5)]
)
def test_sizes_are_rounded_up_and_bounded(settings: dict, expected: int) -> None:
    assert new_sizes({"a": STEEP}, CompreSSMConfig(tolerance=0.005, **settings)) == {"a": expected}


def test_a_multiple_beyond_the_size_keeps_the_layer() -> None:
    assert new_sizes({"a": STEEP}, CompreSSMConfig(tolerance=0.005, multiple_of=16)) == {"a": 8}


@given(
    values=st.lists(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), min_size=1, max_size=4),
    tolerance=st.floats(1e-6, 0.999),
    multiple=st.integers(1, 4),
    uniform=st.booleans(),
)
def test_no_layer_drops_more_energy_than_the_tolerance(values, tolerance, multiple, uniform) -> None:
    spectra = {str(i): torch.tensor(sorted(v, reverse=True), dtype=torch.float64) for i, v in enumerate(values)}
    config = CompreSSMConfig(tolerance=tolerance, multiple_of=multiple, uniform=uniform)
    sizes = new_sizes(spectra, config)
    for name, sigma in spectra.items():
        assert 1 <= sizes[name] <= 6
        assert sigma[sizes[name] :].sum() <= tolerance * sigma.sum() * (1 + 1e-9)
        assert sizes[name] == 6 or sizes[name] % multiple == 0
    if uniform:
        assert len(set(sizes.values())) == 1


def rungs(config: CompreSSMConfig, total: int, size: int = 64) -> list[int]:
    """The sizes after each of `total` checks."""
    sizes, original = [], {"a": size}
    for number in range(1, total + 1):
        stage = Stage(number, total, original)
        size = plan_reduction({"a": torch.ones(size, dtype=torch.float64)}, {"a": size}, config, stage)["a"].new_size
        sizes.append(size)
    return sizes


def test_a_target_is_reached_in_equal_ratios_at_the_last_check() -> None:
    assert rungs(CompreSSMConfig(strategy="target", target_state_size=8), 3) == [32, 16, 8]
    assert rungs(CompreSSMConfig(strategy="target", target_ratio=0.1), 1) == [7]
    assert rungs(CompreSSMConfig(strategy="target", target_ratio=0.25), 4)[-1] == 16
    assert rungs(CompreSSMConfig(strategy="target", target_state_size=200), 2) == [64, 64]


@given(st.integers(1, 64), st.integers(1, 12))
def test_every_target_is_met_exactly_however_many_checks_there_are(target: int, total: int) -> None:
    sizes = rungs(CompreSSMConfig(strategy="target", target_state_size=target), total)
    assert sizes[-1] == target and sizes == sorted(sizes, reverse=True)


def test_the_last_step_to_a_target_passes_the_gate_however_small() -> None:
    assert rungs(CompreSSMConfig(strategy="target", target_state_size=63), 1) == [63]


def test_layers_that_are_cut_when_settled_go_to_the_target_at_once() -> None:
    config = CompreSSMConfig(strategy="target", target_state_size=8, when_stable=0.9)
    plan = plan_reduction({"a": FLAT.repeat(8)}, {"a": 64}, config, Stage(2, 10, {"a": 64}))
    assert plan["a"].new_size == 8


def test_layers_that_wait_keep_their_size_and_hold_uniform_ones_back() -> None:
    spectra, sizes = {"a": STEEP, "b": STEEP}, {"a": 8, "b": 8}
    stage = Stage(1, 2, sizes, waiting=frozenset({"a"}))
    free = plan_reduction(spectra, sizes, CompreSSMConfig(tolerance=0.005, uniform=False), stage)
    assert (free["a"].new_size, free["a"].wanted, free["b"].new_size) == (8, 3, 3)
    assert not any(layer.is_cut for layer in plan_reduction(spectra, sizes, CompreSSMConfig(), stage).values())


@pytest.mark.parametrize(
    "settings, full, half",
    [
        ({"tolerance": 0.2}, 5, 6),
        ({"strategy": "fixed", "keep_ratio": 0.5}, 4, 6),
        ({"strategy": "pragmatic", "keep_ratio": 0.5}, 4, 6),
        ({"strategy": "target", "target_state_size": 2}, 2, 4),
    ],
)
def test_half_a_step_drops_less(settings: dict, full: int, half: int) -> None:
    sigma = spectrum(8, 4, 2, 2, 2, 2, 1.5, 0.5)
    for scale, expected in ((1.0, full), (0.5, half)):
        plan = plan_reduction({"a": sigma}, {"a": 8}, CompreSSMConfig(**settings), Stage(1, 1, {"a": 8}, scale=scale))
        assert plan["a"].new_size == expected


@pytest.mark.parametrize("size, new, gate", [(90, 63, 0.30), (75, 51, 0.32), (20, 19, 0.05)])
def test_the_gate_is_not_decided_by_rounding(size: int, new: int, gate: float) -> None:
    config = CompreSSMConfig(strategy="target", target_state_size=new, minimum_reduction=gate)
    plan = plan_reduction({"a": torch.ones(size)}, {"a": size}, config, Stage(1, 1, {"a": size}))
    fixed = CompreSSMConfig(strategy="fixed", keep_ratio=new / size, minimum_reduction=gate)
    assert plan["a"].new_size == plan_reduction({"a": torch.ones(size)}, {"a": size}, fixed)["a"].new_size == new


def fewest_states(spectra: list[list[float]], tolerance: float, least: int) -> int:
    """The least number of states in total that keeps the joint budget, by trying all."""
    allowed = tolerance * math.fsum(value for sigma in spectra for value in sigma)
    ranges = [range(min(least, len(sigma)) if sigma[0] > 0 else len(sigma), len(sigma) + 1) for sigma in spectra]
    return min(
        sum(ranks)
        for ranks in itertools.product(*ranges)
        if math.fsum(value for sigma, rank in zip(spectra, ranks) for value in sigma[rank:]) <= allowed
    )


# Whole numbers, so that ties are common and sums, with these tolerances, exact.
SPECTRA = st.lists(
    st.lists(st.integers(0, 12).map(float), min_size=1, max_size=4).map(lambda v: sorted(v, reverse=True)),
    min_size=1, max_size=4,
)  # fmt: skip


@given(SPECTRA, st.sampled_from([1 / 16, 1 / 8, 1 / 4, 1 / 2]), st.integers(1, 3))
def test_a_budget_for_the_model_keeps_the_fewest_states(spectra, tolerance: float, least: int) -> None:
    config = CompreSSMConfig(
        tolerance=tolerance, uniform=False, budget="model", min_state_size=least, minimum_reduction=0.0
    )
    sizes = list(new_sizes({str(i): spectrum(*sigma) for i, sigma in enumerate(spectra)}, config).values())
    dropped = sum(sum(sigma[rank:]) for sigma, rank in zip(spectra, sizes))
    assert dropped <= tolerance * sum(map(sum, spectra))
    assert all(rank >= min(least, len(sigma)) for rank, sigma in zip(sizes, spectra))
    assert sum(sizes) == fewest_states(spectra, tolerance, least)


def test_a_budget_for_the_model_spends_states_where_the_energy_is() -> None:
    weak, strong = 1e-3 * STEEP, FLAT * 10
    layers = {"weak": weak, "strong": strong}
    per_layer = CompreSSMConfig(tolerance=0.005, uniform=False)
    assert new_sizes(layers, per_layer) == {"weak": 3, "strong": 8}
    assert new_sizes(layers, replace(per_layer, budget="model")) == {"weak": 1, "strong": 8}
    assert new_sizes(layers, replace(per_layer, budget="model", multiple_of=4)) == {"weak": 4, "strong": 8}
    # 2e-5 and 1e-5 of 80.11 are 1.6e-3 and 8.0e-4; below 0.1, 0.01 and 0.001 there are 1.1e-4 in the weak layer.
    small = replace(per_layer, tolerance=2e-5, budget="model")
    assert new_sizes(layers, small) == {"weak": 2, "strong": 8}
    halved = plan_reduction(layers, {"weak": 8, "strong": 8}, small, Stage(scale=0.5))
    assert {name: layer.new_size for name, layer in halved.items()} == {"weak": 3, "strong": 8}


def test_a_layer_that_shows_nothing_keeps_its_states_under_a_budget_for_the_model() -> None:
    config = CompreSSMConfig(tolerance=0.005, uniform=False, budget="model")
    assert new_sizes({"dead": 0 * FLAT, "a": STEEP}, config) == {"dead": 8, "a": 3}
    assert new_sizes({"dead": 0 * FLAT}, config) == {"dead": 8}


@pytest.mark.parametrize("settings", [{"uniform": True}, {"uniform": False, "strategy": "fixed"}], ids=str)
def test_a_budget_for_the_model_needs_sizes_that_follow_the_spectra(settings: dict) -> None:
    with pytest.raises(ConfigurationError, match="budget='model'"):
        CompreSSMConfig(budget="model", **settings)
