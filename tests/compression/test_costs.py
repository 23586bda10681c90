"""What a cut adds and saves, by one definition for tables, records and commands, and the cuts that do not pay."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression import LayerPlan, calibrate, compressor, evaluate_loss
from hf_compressm.compression.attempt import MadeCut
from hf_compressm.compression.costs import CutCost, cuts_that_do_not_pay
from hf_compressm.errors import ConfigurationError
from hf_compressm.systems import Truncation
from tests.cases import tiny_lru, tiny_mamba, token_batch
from tests.delta_rule_models import tiny_gated_delta_net
from tests.lightning_models import tiny_minimax
from tests.selective_models import tiny_mamba2
from tests.xlstm_models import tiny_xlstm

MODELS = {
    "mamba": (tiny_mamba, {}),
    "mamba2, mixed": (tiny_mamba2, {}),
    "mamba2, stock": (tiny_mamba2, {"stock": True}),
    "lru": (tiny_lru, {}),
    "gated delta net, mixed": (lambda: tiny_gated_delta_net("qwen3_next"), {}),
}


def batches() -> list[dict[str, Tensor]]:
    return [token_batch(6, 24, seed=seed) for seed in range(4)]


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_analyze_shows_what_compress_makes(name: str) -> None:
    build, settings = MODELS[name]
    model = build()
    config = CompreSSMConfig(**settings)
    spectrum = analyze(model, batches(), config, sizes=[2, 5], timed=False)
    assert [row.state_size for row in spectrum.sizes] == [8, 5, 2]
    for row in spectrum.sizes[1:]:
        cut = copy.deepcopy(model)
        # What the table's cuts are made with; a time-invariant layer sets one batch apart to compare outputs on.
        record = compress(
            cut,
            batches()[: 3 if name == "lru" else 2],
            CompreSSMConfig(state_size=row.state_size, minimum_reduction=0.0, **settings),
        )
        assert record.outcome == "cut"
        assert record.parameters_before == spectrum.sizes[0].parameters == counted(model)
        assert row.parameters == record.parameters_after == counted(cut)
        assert (spectrum.sizes[0].state_bytes, row.state_bytes) == record.state_bytes
        assert row.loss == pytest.approx(evaluate_loss(cut, batches()[2:]), rel=1e-3)
        # What the record computes is what the model that was cut shows.
        shown = calibrate(cut, find_layers(cut), batches()[:1]).state_bytes
        assert sum(shown.values()) == record.state_bytes[1]


@pytest.mark.parametrize("name", MODELS)
def test_the_search_by_loss_tries_what_the_table_shows(name: str) -> None:
    build, settings = MODELS[name]
    model = build()
    record = compress(copy.deepcopy(model), batches(), CompreSSMConfig(max_loss_increase=0.5, **settings))
    before, *tried = [(max(trial.sizes.values()), trial.loss) for trial in record.trials]
    spectrum = analyze(model, batches(), CompreSSMConfig(**settings), sizes=[size for size, _ in tried], timed=False)
    shown = {row.state_size: row.loss for row in spectrum.sizes}
    assert tried and shown == pytest.approx(dict([before, *tried]), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_analyze_and_compress_see_the_same_spectra(name: str) -> None:
    build, settings = MODELS[name]
    model = build()
    spectrum = analyze(model, batches(), CompreSSMConfig(seed=3, **settings))
    record = compress(model, batches(), CompreSSMConfig(seed=3, tolerance=0.3, **settings))
    assert record.loss_before == spectrum.loss
    for layer in record.layers:
        assert layer.hankel_singular_values == spectrum.sigma[layer.name].tolist()


def test_what_pays() -> None:
    assert CutCost(-5, -20, 0).pays and CutCost(5, 20, 20).pays and CutCost(5, 20, None).pays
    assert not CutCost(5, 20, 19).pays


def growing(**settings) -> tuple[nn.Module, list[dict[str, Tensor]], CompreSSMConfig]:
    """A Mamba-2 whose spectra ask for 6 or 7 of 8 states: two matrices of 8 x 7 are more than what the state saves."""
    return tiny_mamba2(), batches(), CompreSSMConfig(min_state_size=6, minimum_reduction=0.0, **settings)


@pytest.mark.parametrize("settings", [{"tolerance": 0.9}, {"max_loss_increase": 0.5}])
def test_a_cut_that_only_makes_a_model_larger_is_left(settings: dict, caplog) -> None:
    model, data, config = growing(**settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        record = compress(model, data, config)
    # Two layers of two groups gain 2 x 8 x 6 numbers each; 32 channels lose two states in each layer.
    assert record.outcome == "kept" and record.reason == (
        "left as it was: a cut to 6 states would add 1,536 bytes of weights and save 512 bytes of recurrent state a "
        "sequence; to cut all the same: set allow_growth=True"
    )
    assert record.parameters_after == record.parameters_before == counted(model)
    assert record.state_bytes[0] == record.state_bytes[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "adds" not in caplog.text

    record = compress(model, data, CompreSSMConfig(**{**config.to_dict(), "allow_growth": True}))
    assert record.outcome == "cut" and record.parameters_after == record.parameters_before + 384
    assert "the cut adds 384 parameters" in caplog.text


def test_a_size_that_was_named_is_made_with_a_warning(caplog) -> None:
    model, data, config = growing(state_size=6)
    with caplog.at_level(logging.WARNING):
        assert compress(model, data, config).outcome == "cut"
    assert "the cut adds 384 parameters" in caplog.text
    with pytest.raises(ConfigurationError, match="allow_growth is True, which the strategy 'target' ignores"):
        CompreSSMConfig(state_size=6, allow_growth=True)


def test_a_cut_pays_or_not_whatever_the_calibration_computes_in() -> None:
    """Under autocast a state is seen in a short type, as the weights are not stored."""
    model = tiny_mamba2()
    seen = [calibrate(model, find_layers(model), batches()).state_bytes]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(calibrate(model, find_layers(model), batches()).state_bytes)
    seen.append(calibrate(model.bfloat16(), find_layers(model), batches()).state_bytes)
    assert seen[0] == seen[1] == {name: 2 * size for name, size in seen[2].items()}


def test_a_table_of_sizes_that_the_cache_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sizes has 12, and the model's cache takes only multiples of 8"):
        analyze(tiny_xlstm(), batches(), sizes=[8, 12])


def test_a_table_of_sizes_times_the_loss_that_was_given() -> None:
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches()]
    rows = analyze(tiny_mamba(), unlabelled, loss_function=lambda m, b: m(**b).logits.square().mean(), sizes=(4,)).sizes
    assert [row.state_size for row in rows] == [8, 4] and all(row.step_seconds > 0 for row in rows)


def test_nothing_is_timed_where_nothing_is_trained() -> None:
    rows = analyze(tiny_mamba().requires_grad_(False), batches(), sizes=(size for size in (4, 2))).sizes
    assert [(row.state_size, row.step_seconds) for row in rows] == [(8, None), (4, None), (2, None)]
    assert all(row.loss > 0 for row in rows)


@pytest.mark.parametrize("wrong", [{"sizes": 4}, {"sizes": None}, {"timed": "no"}], ids=str)
def test_arguments_of_the_table_are_checked_first(wrong: dict) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        analyze(tiny_mamba(), batches(), **wrong)


def test_no_stock_form_is_offered_where_there_is_none(caplog) -> None:
    for build, offered in ((tiny_mamba2, True), (tiny_minimax, False)):
        caplog.clear()
        size = find_layers(build())[0].state_size
        assert compress(build(), batches(), CompreSSMConfig(state_size=size - 1, minimum_reduction=0)).outcome == "cut"
        assert "the cut adds" in caplog.text and ("stock=True" in caplog.text) is offered


def test_a_size_that_comes_of_multiples_is_told_with_them() -> None:
    record = compress(tiny_xlstm(8), batches(), CompreSSMConfig(strategy="fixed"))
    assert record.outcome == "kept" and record.reason == "the spectra ask for 8 of 8 states, in multiples of 8"


def test_a_cut_that_pays_is_made() -> None:
    record = compress(tiny_mamba2(), batches(), CompreSSMConfig(tolerance=0.9))
    assert record.outcome == "cut" and record.layers[0].size_after < 4


def test_with_sizes_of_their_own_each_layer_has_to_pay() -> None:
    layers = find_layers(tiny_mamba2())
    leading = [torch.eye(8, dtype=torch.float64)[:, :size] for size in (2, 7)]
    reductions = [layer.reduce(Truncation(T=part, W=part)) for layer, part in zip(layers, leading)]
    state_bytes = {layer.name: 32 * 8 * 4 for layer in layers}
    alone = cuts_that_do_not_pay(reductions, state_bytes, together=False)
    assert alone == {layers[1].name: CutCost(224, 896, 128)}
    # Together they add 1,152 bytes and save 896; without knowing what is saved, nothing is held back.
    assert list(cuts_that_do_not_pay(reductions, state_bytes, together=True)) == [layer.name for layer in layers]
    assert cuts_that_do_not_pay(reductions, {}, together=False) == {}

    made = MadeCut({layer.name: layer for layer in layers}, reductions, []).without(alone)
    assert list(made.found) == [layers[0].name] and made.reductions == reductions[:1]


def test_layers_that_do_not_pay_stay_while_others_are_cut(monkeypatch, caplog) -> None:
    model = tiny_mamba2()
    first, second = (layer.name for layer in find_layers(model))
    monkeypatch.setattr(
        compressor, "plan_reduction", lambda *_: {first: LayerPlan(8, 2, 2), second: LayerPlan(8, 7, 7)}
    )
    record = compress(model, batches(), CompreSSMConfig(uniform=False))
    assert record.outcome == "cut" and [layer.size_after for layer in record.layers] == [2, 8]
    assert f"some layers stay as they are: {second}: a cut to 7 states would add 896 bytes" in record.reason
    assert record.reason in caplog.text
