"""A whole check: what it decides, what it writes, and that it never writes a half."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.cards import Provenance, render_card
from hf_compressm.compression import CheckRecord, Compressor, EmpiricalGramians, commit_together
from hf_compressm.compression import compressor as compressor_module
from hf_compressm.compression.decide import truncations
from hf_compressm.errors import CalibrationError, TruncationError, UnsupportedModelError
from tests.cases import (
    AVERAGED_CASES,
    CASES,
    PRETRAINED_CASES,
    SELECTIVE_CASES,
    case_id,
    logits_of,
    size_in_config,
    tiny_lru,
    tiny_mamba,
    token_batch,
)
from tests.delta_rule_models import GATED_CONFIGS, tiny_gated_delta_net

HALF = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)


def snapshot(model: nn.Module) -> dict:
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "identities": {name: id(parameter) for name, parameter in model.named_parameters()},
        "sizes": {
            name: (getattr(m, "ssm_state_size", None), getattr(m, "out_features", None))
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after["identities"] == before["identities"]
    assert after["sizes"] == before["sizes"] and after["config"] == before["config"]
    assert all(torch.equal(before["tensors"][name], tensor) for name, tensor in after["tensors"].items())


EVERY_WAY = [
    pytest.param(case, reductor, gramians, id=f"{case.name}-{reductor}-{gramians}")
    for case in CASES
    for reductor in ("auto", *case.reductors)
    for gramians in (
        "loss_gradient",
        *(["white_noise"] if case in SELECTIVE_CASES else []),
        *(["averaged"] if case in AVERAGED_CASES else []),
    )
]


@pytest.mark.parametrize("case, reductor, gramians", EVERY_WAY)
def test_every_family_is_cut_by_every_reductor(case, reductor: str, gramians: str) -> None:
    model, batch = case.build(), case.batch()
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, reductor=reductor, gramians=gramians, stock=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record = compress(model, [batch], config)
    assert record.outcome == "cut"
    assert [(layer.size_before, layer.size_after) for layer in record.layers] == [(8, 4)] * case.layers
    assert record.parameters_before == parameters
    assert record.parameters_after == sum(parameter.numel() for parameter in model.parameters()) < parameters
    assert math.isfinite(record.loss_before) and math.isfinite(record.loss_after)
    assert torch.isfinite(logits_of(model, batch)).all()


@pytest.mark.parametrize("family", GATED_CONFIGS)
def test_the_delta_rule_has_no_averages(family: str) -> None:
    model = tiny_gated_delta_net(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="has no means over time"):
        compress(model, [token_batch()], CompreSSMConfig(state_size=4, gramians="averaged"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_interpolative_cut_beats_selection_and_random_states() -> None:
    """The logits' error, the mean over a few models: folding what is known of the dropped states must help."""
    errors = {}
    for name, settings in {
        "interpolative": {},
        "selection": {"reductor": "selection"},
        "random": {"reductor": "selection", "selection_rule": "random"},
    }.items():
        total = 0.0
        for seed in range(3):
            model, batch = tiny_mamba(state_size=12, seed=seed), token_batch(batch=8, length=30)
            with torch.no_grad():
                for layer in model.backbone.layers:
                    layer.mixer.x_proj.weight.mul_(3)
            before = logits_of(model, batch)
            compress(model, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=0.34, **settings))
            total += float((logits_of(model, batch) - before).norm() / before.norm())
        errors[name] = total
    assert errors["interpolative"] < errors["selection"] < errors["random"]


@pytest.mark.parametrize("case", PRETRAINED_CASES, ids=case_id)
def test_saved_and_loaded_by_the_stock_class(case, tmp_path) -> None:
    model, batch = case.build(), case.batch()
    compress(model, [batch], replace(HALF, stock=True))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert size_in_config(loaded) == 4 and type(size_in_config(loaded)) is int
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_the_tolerance_bounds_the_dropped_energy_and_repeated_checks_go_on() -> None:
    model, batch = tiny_mamba(state_size=16), token_batch(batch=8)
    compressor = Compressor(model, CompreSSMConfig(tolerance=0.05), progress=False)
    first = compressor.check([batch], step=1)
    assert first.outcome == "cut" and all(layer.tail_share <= 0.05 for layer in first.layers)
    assert all(layer.rank_correlation is None for layer in first.layers)
    second = compressor.check([batch], step=2)
    assert all(-1 <= layer.rank_correlation <= 1 for layer in second.layers)
    assert [record.step for record in compressor.records] == [1, 2]
    assert max(layer.size_before for layer in second.layers) == model.config.state_size or second.outcome == "cut"


def test_the_order_of_an_unchanged_model_is_perfectly_correlated() -> None:
    compressor = Compressor(tiny_mamba(), CompreSSMConfig(tolerance=1e-9), progress=False)
    for step in (1, 2):
        record = compressor.check([token_batch()], step=step)
    assert record.outcome == "kept"
    assert [layer.rank_correlation for layer in record.layers] == pytest.approx([1, 1])


def test_a_loss_that_breaks_after_the_cut_takes_the_cut_back(monkeypatch) -> None:
    model = tiny_mamba()
    before = snapshot(model)
    monkeypatch.setattr(compressor_module, "evaluate_loss", lambda *args, **kwargs: float("nan"))
    record = compress(model, [token_batch()], HALF)
    assert record.outcome == "skipped" and "loss after the cut was nan" in record.reason
    assert record.parameters_before == record.parameters_after
    assert_unchanged(model, before)


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_interruption_after_the_cut_takes_it_back(monkeypatch, failure: BaseException) -> None:
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters())
    before = snapshot(model)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(compressor_module, "evaluate_loss", fail)
    with pytest.raises(type(failure)):
        compress(model, [token_batch()], HALF, optimizer)
    assert_unchanged(model, before)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(before["identities"].values())


def test_a_cut_that_cannot_be_recorded_is_taken_back(monkeypatch) -> None:
    model = tiny_mamba()
    before = snapshot(model)

    def fail(*args):
        assert model.config.state_size < before["config"]["state_size"], "it is asked of the model that is cut"
        raise RuntimeError("no memory for the outputs")

    monkeypatch.setattr(compressor_module.OutputsOf, "errors", fail)
    compressor = Compressor(model, HALF, progress=False)
    (record,) = compressor.check_or_skip([token_batch()], step=1, steps=[1])
    assert record.outcome == "skipped" and "no memory for the outputs" in record.reason
    assert_unchanged(model, before)
    assert compressor.pending is None


@pytest.mark.parametrize("failing_layer", [0, 1])
def test_a_truncation_that_fails_leaves_all_layers_whole(monkeypatch, failing_layer: int) -> None:
    model, calls = tiny_mamba(), []
    before = snapshot(model)
    real = EmpiricalGramians.truncate

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) - 1 == failing_layer:
            raise TruncationError("condition number 1e20")
        return real(*args, **kwargs)

    monkeypatch.setattr(EmpiricalGramians, "truncate", sometimes)
    record = compress(model, [token_batch()], HALF)
    assert record.outcome == "skipped" and "condition number 1e20" in record.reason
    assert [layer.size_after for layer in record.layers] == [8, 8]
    assert_unchanged(model, before)


def test_a_follower_that_fails_leaves_the_model_whole() -> None:
    model = tiny_mamba()
    before = snapshot(model)

    class Fails:
        def commit(self) -> None:
            raise RuntimeError("the wrapper refused")

        def rollback(self) -> None:
            pass

    compressor = Compressor(model, HALF, followers=[lambda changes: Fails()], progress=False)
    with pytest.raises(RuntimeError, match="the wrapper refused"):
        compressor.check([token_batch()])
    assert_unchanged(model, before)
    assert compressor.records == []


def test_changes_are_rolled_back_in_reverse_order() -> None:
    log = []

    class Logged:
        def __init__(self, name: str, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def commit(self) -> None:
            log.append(f"commit {self.name}")
            if self.fails:
                raise ValueError

        def rollback(self) -> None:
            log.append(f"rollback {self.name}")

    with pytest.raises(ValueError):
        commit_together([Logged("a"), Logged("b", fails=True), Logged("c")])
    assert log == ["commit a", "commit b", "rollback c", "rollback b", "rollback a"]


def test_a_calibration_error_changes_nothing() -> None:
    model = tiny_mamba()
    before = snapshot(model)
    with pytest.raises(CalibrationError):
        compress(model, [{"input_ids": token_batch()["input_ids"]}], HALF)
    assert_unchanged(model, before)


def test_sizes_that_differ_are_refused_where_the_checkpoint_cannot_hold_them() -> None:
    with pytest.raises(UnsupportedModelError, match="uniform=False.*mamba.*Leave uniform=True"):
        compress(tiny_mamba(), [token_batch()], CompreSSMConfig(uniform=False, stock=True))


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_mamba()
    compress(model, [token_batch()], HALF)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_analyze_changes_nothing_and_agrees_with_compress() -> None:
    model, batch = tiny_mamba(), token_batch()
    before = snapshot(model)
    spectrum = analyze(model, [batch])
    assert_unchanged(model, before)
    record = compress(model, [batch], CompreSSMConfig(tolerance=0.05))
    wanted = {layer.name: layer.wanted_size for layer in record.layers}
    assert spectrum.ranks(0.05) == wanted
    for layer in record.layers:
        assert layer.hankel_singular_values == pytest.approx(spectrum.sigma[layer.name].tolist())


@pytest.mark.parametrize("after_rollback, sizes", [("stop", [8]), ("halve", [8, 6])])
def test_a_cut_that_the_calibration_loss_refuses_is_taken_back(monkeypatch, after_rollback: str, sizes: list) -> None:
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters())
    before = snapshot(model)
    config = CompreSSMConfig(strategy="fixed", rollback_tolerance=0.1, after_rollback=after_rollback)
    compressor = Compressor(model, config, optimizer=optimizer, progress=False)
    real = compressor_module.evaluate_loss
    monkeypatch.setattr(compressor_module, "evaluate_loss", lambda *args: real(*args) + 0.2)
    record = compressor.check([token_batch()], step=5)
    assert [r.outcome for r in compressor.records] == ["cut", "rolled_back"] and record is compressor.records[1]
    assert "calibration loss rose by 0." in record.reason and record.step == 5
    after = snapshot(model)
    assert after["config"] == before["config"] and after["sizes"] == before["sizes"]
    assert all(torch.equal(before["tensors"][name], tensor) for name, tensor in after["tensors"].items())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert compressor.is_finished == (after_rollback == "stop")

    monkeypatch.setattr(compressor_module, "evaluate_loss", real)
    if after_rollback == "halve":
        assert compressor.check([token_batch()], step=6).outcome == "cut"
    assert model.config.state_size == sizes[-1]


def test_a_cut_that_the_calibration_loss_accepts_stays(monkeypatch) -> None:
    monkeypatch.setattr(compressor_module, "evaluate_loss", lambda *args: 0.0)
    compressor = Compressor(tiny_mamba(), CompreSSMConfig(strategy="pragmatic"), progress=False)
    assert compressor.check([token_batch()]).outcome == "cut"
    assert compressor.pending is None and not compressor.is_finished


def test_a_settled_order_is_cut_before_the_window_ends() -> None:
    config = CompreSSMConfig(strategy="fixed", when_stable=0.9)
    compressor = Compressor(tiny_mamba(), config, progress=False)
    outcomes = [compressor.check([token_batch()], step=s, number=s, total=9).outcome for s in range(1, 4)]
    assert outcomes == ["kept", "kept", "cut"] and compressor.is_finished


def test_scores_after_a_fold_are_those_that_the_next_check_finds() -> None:
    model, batch = tiny_mamba(state_size=16), token_batch(batch=16, length=40)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.x_proj.weight.mul_(2)
    # A readout that is fitted to the outputs changes what a state is worth.
    compressor = Compressor(model, CompreSSMConfig(strategy="fixed", fit_readout=False), progress=False)
    first = compressor.check([batch], step=1)
    assert 0 < max(layer.lost_energy for layer in first.layers) < 0.5
    second = compressor.check([batch], step=2)
    assert min(layer.rank_correlation for layer in second.layers) > 0.9


def test_the_lost_energy_is_that_of_the_gramians_whatever_is_fitted() -> None:
    """A fitted readout gives the outputs better, and what the Gramians hold of them worse."""
    lost = []
    for fitted in (True, False):
        config = CompreSSMConfig(strategy="fixed", fit_readout=fitted)
        record = Compressor(tiny_mamba(state_size=16), config, progress=False).check([token_batch(batch=16, length=40)])
        assert any(layer.readout_fitted for layer in record.layers) is fitted
        lost.append([layer.lost_energy for layer in record.layers])
    assert lost[0] == pytest.approx(lost[1]) and min(lost[0]) > 0


def test_every_reductor_and_its_default_are_checked_when_the_compressor_is_made() -> None:
    assert Compressor(tiny_mamba(), CompreSSMConfig(), progress=False)
    with pytest.raises(UnsupportedModelError, match="cannot hold what the reductor 'balanced' gives"):
        Compressor(tiny_mamba(), CompreSSMConfig(reductor="balanced"), progress=False)


@pytest.mark.parametrize("progress", [True, False])
def test_long_work_says_what_it_does_unless_told_not_to(progress: bool, capsys) -> None:
    Compressor(tiny_mamba(), CompreSSMConfig(strategy="fixed"), progress=progress).check([token_batch()])
    printed = capsys.readouterr().err
    assert ("calibrating" in printed) == ("cutting" in printed) == progress


@pytest.mark.parametrize(
    ("setting", "trained_on", "fits"), [(None, False, True), (None, True, False), (True, True, True)]
)
def test_readouts_are_fitted_where_the_training_is_over(setting, trained_on: bool, fits: bool, monkeypatch) -> None:
    fitted = []
    monkeypatch.setattr(truncations, "fit_readouts", lambda cuts, samples: fitted.extend(samples) or list(cuts))
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters()) if trained_on else None
    compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", fit_readout=setting), optimizer)
    assert bool(fitted) == fits


FITS = [({}, True), ({"fit_readout": False}, False), ({"reductor": "selection"}, False)]


@pytest.mark.parametrize("build", [tiny_mamba, tiny_lru])
@pytest.mark.parametrize(("settings", "fitted"), FITS)
def test_the_record_and_the_card_say_whose_readouts_were_fitted(build, settings: dict, fitted: bool) -> None:
    record = compress(build(), [token_batch(16, 30)], CompreSSMConfig(state_size=3, **settings))
    assert any(layer.readout_fitted for layer in record.layers) == fitted
    assert CheckRecord.from_dict(record.to_dict()) == record
    text = render_card(Provenance([record], CompreSSMConfig(state_size=3, **settings)))
    number = sum(layer.readout_fitted for layer in record.layers)
    told = f"{'all' if number == 2 else f'{number} of 2'} layers were fitted to the outputs"
    assert (told in text) == fitted
