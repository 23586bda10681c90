"""Sizes that follow the loss, and the best of several truncations, on models that need their state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.compression.measure.model_pass import evaluate_loss
from hf_compressm.errors import CalibrationError, ConfigurationError
from tests.cases import VOCABULARY, tiny_lru, tiny_mamba
from tests.selective_models import tiny_mamba2

STATE_SIZE = 8
BUILDERS = {"mamba": tiny_mamba, "mamba2": tiny_mamba2, "lru": tiny_lru}


def periodic_batch(seed: int, batch: int = 24, period: int = 4, length: int = 24) -> dict[str, Tensor]:
    """Sequences that repeat themselves: to continue one, its last `period` tokens have to be remembered."""
    first = torch.randint(0, VOCABULARY, (batch, period), generator=torch.Generator().manual_seed(seed))
    tokens = first.repeat(1, length // period)
    return {"input_ids": tokens, "labels": tokens.clone()}


def trained(name: str) -> PreTrainedModel:
    model = BUILDERS[name](state_size=STATE_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        model(**periodic_batch(1000 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return trained(request.param), [periodic_batch(seed) for seed in range(4)]


def loss_with(model: PreTrainedModel, batches: list, held_out: list, size: int) -> float:
    """What a cut to one size does to the loss on other batches, made in the ordinary way."""
    cut = copy.deepcopy(model)
    settings = CompreSSMConfig(state_size=size, minimum_reduction=0.0)
    compress(cut, batches, settings)
    return evaluate_loss(cut, held_out)


@pytest.mark.parametrize("allowed", [0.002, 0.05, 0.4])
def test_the_size_is_the_smallest_within_the_limit(case, allowed: float) -> None:
    model, batches = case
    # A cut of a given size takes the last batch of a time-invariant layer for the error of its output.
    calibrating, held_out = batches[:2], batches[2:]
    spare = [batches[0]] if "LRU" in type(model).__name__ else []
    before = evaluate_loss(model, held_out)
    losses = {size: loss_with(model, [*calibrating, *spare], held_out, size) for size in range(1, STATE_SIZE)}
    limit = before * (1 + allowed)
    cut = copy.deepcopy(model)
    config = CompreSSMConfig(max_loss_increase=allowed, minimum_reduction=0.0)
    assert config.strategy == "loss"
    record = compress(cut, batches, config)
    size = record.layers[0].size_after
    assert evaluate_loss(cut, held_out) <= limit * (1 + 1e-6)
    if size < STATE_SIZE:
        assert losses[size] == pytest.approx(evaluate_loss(cut, held_out), rel=1e-3)
    assert size == 1 or losses[size - 1] > limit, "one state less was within the limit too"
    assert record.trials[0].loss == pytest.approx(before, rel=1e-5)
    assert {trial.sizes[record.layers[0].name] for trial in record.trials} <= set(range(1, STATE_SIZE + 1))
    assert len(record.trials) <= 2 + math.ceil(math.log2(STATE_SIZE)), "a search, not a walk"


def test_a_tighter_limit_keeps_more_states(case) -> None:
    model, batches = case
    sizes = []
    for allowed in (0.001, 0.1, 0.9):
        cut = copy.deepcopy(model)
        record = compress(cut, batches, CompreSSMConfig(max_loss_increase=allowed))
        sizes.append(record.layers[0].size_after)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < STATE_SIZE


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_each_layer_can_have_its_own_size(budget: str) -> None:
    model, batches = trained("mamba2"), [periodic_batch(seed) for seed in range(4)]
    before = evaluate_loss(model, batches[2:])
    record = compress(model, batches, CompreSSMConfig(max_loss_increase=0.05, uniform=False, budget=budget))
    assert record.outcome == "cut"
    assert evaluate_loss(model, batches[2:]) <= before * (1 + 0.05 + 1e-6)
    assert {layer.name: layer.size_after for layer in record.layers} in [trial.sizes for trial in record.trials]


def test_nothing_is_left_of_what_was_tried(case) -> None:
    model, batches = case
    tried = copy.deepcopy(model)
    parameters = dict(tried.named_parameters())
    record = compress(tried, batches, CompreSSMConfig(max_loss_increase=1e-9, allow_growth=True))
    if record.outcome == "kept":
        assert "the loss asks for" in record.reason
        assert all(parameter is parameters[name] for name, parameter in tried.named_parameters())
        assert type(tried) is type(model)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in tried.state_dict().items())


def test_the_best_of_several_truncations_is_kept(case) -> None:
    model, batches = case
    usual, best = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"state_size": 3, "minimum_reduction": 0.0}
    spare = batches[:1] if "LRU" in type(model).__name__ else []
    compress(usual, [*batches[:2], *spare], CompreSSMConfig(**settings))
    record = compress(best, batches, CompreSSMConfig(**settings, compare_truncations=True))
    losses = [trial.loss for trial in record.trials]
    assert len(losses) == 2 and len({trial.truncation for trial in record.trials}) == 2
    assert evaluate_loss(best, batches[2:]) == pytest.approx(min(losses), rel=1e-4)
    assert losses[0] == pytest.approx(evaluate_loss(usual, batches[2:]), rel=1e-3)


def test_one_batch_cannot_make_a_cut_and_judge_it() -> None:
    with pytest.raises(CalibrationError, match="two batches or more"):
        compress(tiny_mamba(), [periodic_batch(0)], CompreSSMConfig(strategy="loss"))


def test_the_error_of_a_time_invariant_layers_output_is_recorded() -> None:
    model = trained("lru")
    batches = [periodic_batch(seed) for seed in range(2)]
    whole = copy.deepcopy(model)
    record = compress(model, batches, CompreSSMConfig(state_size=3, minimum_reduction=0.0))
    assert record.layers
    for layer in record.layers:
        inputs: list[Tensor] = []
        before, after = whole.get_submodule(layer.name), model.get_submodule(layer.name)
        handle = before.register_forward_hook(lambda module, args, output, inputs=inputs: inputs.extend([args, output]))
        with torch.no_grad():
            whole(**batches[1], use_cache=False)
            handle.remove()
            args, expected = inputs
            error = (after(*args) - expected).norm() / expected.norm()
        assert layer.output_error == pytest.approx(float(error), rel=1e-4) and layer.output_error > 1e-4


def test_a_table_of_sizes_tells_what_cuts_would_give(case) -> None:
    model, batches = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    spectrum = analyze(model, batches, sizes=[2, 5])
    assert [row.state_size for row in spectrum.sizes] == [STATE_SIZE, 5, 2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for row in spectrum.sizes[1:]:
        cut = copy.deepcopy(model)
        compress(cut, batches[:3] if "LRU" in type(model).__name__ else batches[:2],
                 CompreSSMConfig(state_size=row.state_size, minimum_reduction=0.0))  # fmt: skip
        assert row.parameters == sum(parameter.numel() for parameter in cut.parameters())
        assert row.loss == pytest.approx(evaluate_loss(cut, batches[2:]), rel=1e-3)
    whole, *cuts = spectrum.sizes
    assert whole.loss == pytest.approx(evaluate_loss(model, batches[2:]), rel=1e-6)
    assert [row.state_bytes * STATE_SIZE for row in cuts] == [row.state_size * whole.state_bytes for row in cuts]
    assert all(row.step_seconds > 0 for row in spectrum.sizes)
    table = spectrum.size_table().splitlines()
    assert len(table) == 5 and f"{whole.loss:.4f}" in table[2] and "+0.00%" in table[2]
    assert len(spectrum.plot().axes) == 3


@pytest.mark.parametrize("size", [0, STATE_SIZE, 2.0, True])
def test_an_impossible_size_is_refused(size) -> None:
    with pytest.raises(ConfigurationError, match="give 1 to 7"):
        analyze(tiny_mamba(), [periodic_batch(0), periodic_batch(1)], sizes=[size])
