"""Cuts that hurt are taken back, with the real Trainer's evaluations as the judge."""

from __future__ import annotations

import math
import os

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from hf_compressm import CompreSSMCallback, CompreSSMConfig, read_history
from hf_compressm.architectures import find_layers
from hf_compressm.compression import AVERAGES_NAME, SNAPSHOT_NAME
from hf_compressm.errors import ConfigurationError, InconsistentModelError
from hf_compressm.training.resume import saved_run
from tests.cases import TRAINED_CASES, case_id, token_batch
from tests.training.test_callback import Notes, Rows, make_trainer
from tests.training.test_features import KeepsAverage
from tests.training.test_resume import StopAt

EVALUATED = {"eval_strategy": "steps", "eval_steps": 100, "logging_steps": 1}


def judged(**settings) -> CompreSSMConfig:
    defaults = {
        "strategy": "fixed",
        "window": (0, 12),
        "interval": 4,
        "rollback_tolerance": 0.5,
        "rollback_metric": "eval_score",
    }
    return CompreSSMConfig(**{**defaults, **settings})


class Judge(TrainerCallback):
    """Gives the evaluation a score: 1 while the state is at least as large as it should be, and 0 below."""

    def __init__(self, least: int, name: str = "eval_score") -> None:
        self.least, self.name, self.seen = least, name, []

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        size = find_layers(model)[0].state_size
        self.seen.append((state.global_step, size))
        metrics[self.name] = float(size >= self.least)


def run(folder, config, judge, model=None, rows=None, **overrides):
    callback = CompreSSMCallback(config)
    # The judge comes first, as a compute_metrics function would.
    trainer = make_trainer(folder, None, model, rows, [judge, callback], **{**EVALUATED, **overrides})
    return callback, trainer


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
def test_a_cut_that_hurts_is_taken_back_and_no_other_follows(case, tmp_path) -> None:
    model, judge = case.build(), Judge(least=4)
    callback, trainer = run(tmp_path, judged(), judge, model, Rows(case.batch(batch=64)))
    trainer.eval_dataset = Rows(case.batch(batch=4, seed=3))
    trainer.train()
    assert [(r.step, r.outcome) for r in callback.records] == [(4, "cut"), (8, "cut"), (8, "rolled_back")]
    assert callback.records[-1].reason == "eval_score went from 1 to 0, allowed is 0.5"
    # One evaluation before each check and one at each cut; none for the third check, which is not made. The last one
    # is the Trainer's own.
    assert judge.seen == [(3, 8), (4, 4), (7, 4), (8, 2), (20, 4)]
    assert find_layers(model)[0].state_size == 4
    assert read_history(tmp_path) == callback.records
    assert {entry["compressm/state_size"] for entry in trainer.state.log_history if "compressm/cut" in entry} == {4, 2}


def test_halving_goes_on_with_smaller_steps(tmp_path) -> None:
    callback, trainer = run(tmp_path, judged(after_rollback="halve"), Judge(least=6))
    trainer.train()
    assert [(r.step, r.outcome) for r in callback.records] == [
        (4, "cut"), (4, "rolled_back"), (8, "cut"), (12, "cut"), (12, "rolled_back"),
    ]  # fmt: skip
    assert trainer.model.config.state_size == 6


@pytest.mark.parametrize("name, greater_is_better", [("eval_loss", None), ("eval_error", False)])
def test_lower_is_better_for_losses_and_where_the_trainer_is_told_so(name, greater_is_better, tmp_path) -> None:
    class Rises(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics[name] = float(state.global_step)

    settings = {} if greater_is_better is None else {"metric_for_best_model": name, "greater_is_better": False}
    config = judged(rollback_metric=name, window=(0, 4), interval=None)
    callback, trainer = run(tmp_path, config, Rises(), **settings)
    trainer.train()
    assert [r.outcome for r in callback.records] == ["cut", "rolled_back"]


def test_the_run_after_a_rollback_is_that_of_a_run_without_a_cut(tmp_path) -> None:
    plain, undone = Notes(), Notes()
    make_trainer(tmp_path / "plain", callbacks=[plain], **EVALUATED).train()
    callback, trainer = run(tmp_path / "undone", judged(window=(0, 4), interval=None), Judge(least=8))
    trainer.add_callback(undone)
    trainer.train()
    assert [r.outcome for r in callback.records] == ["cut", "rolled_back"]
    assert undone.losses == pytest.approx(plain.losses, rel=2e-5)


SLOW = {"window": (0, 4), "interval": None, "rollback_after": 5}


@pytest.mark.parametrize("least, size", [(8, 8), (4, 4)])
def test_a_cut_may_have_time_to_recover(least: int, size: int, tmp_path) -> None:
    judge = Judge(least)
    callback, trainer = run(tmp_path, judged(**SLOW), judge)
    trainer.train()
    assert judge.seen == [(3, 8), (9, 4), (20, size)]
    assert trainer.model.config.state_size == size
    moments = trainer.optimizer.optimizer.state
    for parameter in trainer.model.parameters():
        assert moments[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("least, size", [(8, 8), (4, 4)])
def test_a_judgement_that_is_still_due_survives_a_restart(least: int, size: int, tmp_path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1}
    whole, rest = Notes(), Notes()
    callback, trainer = run(tmp_path / "whole", judged(**SLOW), Judge(least))
    trainer.add_callback(whole)
    trainer.train()

    _, first = run(tmp_path / "parts", judged(**SLOW), Judge(least), **saves)
    first.add_callback(StopAt(6))
    first.train()
    assert (tmp_path / "parts" / "checkpoint-6" / SNAPSHOT_NAME).is_file()
    assert not (tmp_path / "parts" / "checkpoint-3" / SNAPSHOT_NAME).exists()
    resumed, second = run(tmp_path / "parts", judged(**SLOW), Judge(least), **saves)
    second.add_callback(rest)
    second.train(resume_from_checkpoint=True)
    assert second.model.config.state_size == size
    assert [r.outcome for r in resumed.records] == [r.outcome for r in callback.records]
    assert rest.losses[-14:] == pytest.approx(whole.losses[6:], rel=1e-5)
    assert not (tmp_path / "parts" / "checkpoint-20" / SNAPSHOT_NAME).exists()


class SavesAverage(KeepsAverage):
    """An average that is saved next to each checkpoint and goes on from there, as a careful user has it."""

    def _file(self, args, state):
        return os.path.join(args.output_dir, f"average-{state.global_step}.pt")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        if state.global_step:
            saved = torch.load(self._file(args, state))
            self.tensors.update(saved) if self.plain else self.average.load_state_dict(saved)

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.tensors if self.plain else self.average.state_dict(), self._file(args, state))

    def state_dict(self):
        return self.tensors if self.plain else self.average.module.state_dict()


def averaged_run(folder, case, keeper, least=8, **overrides):
    callback = CompreSSMCallback(judged(**SLOW), averaged_weights=[keeper.tensors] if keeper.plain else ())
    callbacks = [Judge(least), keeper, callback]
    settings = {**EVALUATED, "save_strategy": "steps", "save_steps": 6, **overrides}
    trainer = make_trainer(folder, None, case.build(), Rows(case.batch(batch=64)), callbacks, **settings)
    trainer.eval_dataset = Rows(case.batch(batch=4, seed=3))
    return callback, trainer


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
@pytest.mark.parametrize("plain", [False, True])
def test_an_average_of_the_weights_is_taken_back_after_a_restart_too(case, plain: bool, tmp_path) -> None:
    whole, first, second = (SavesAverage(plain) for _ in range(3))
    averaged_run(tmp_path / "whole", case, whole)[1].train()
    _, trainer = averaged_run(tmp_path / "parts", case, first)
    trainer.add_callback(StopAt(6))
    trainer.train()
    callback, trainer = averaged_run(tmp_path / "parts", case, second)
    trainer.train(resume_from_checkpoint=True)
    assert [r.outcome for r in callback.records] == ["cut", "rolled_back"]
    assert second.state_dict().keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_an_average_that_no_checkpoint_knows_goes_back_to_the_model_s_own_weights(tmp_path, caplog) -> None:
    """As in a checkpoint of an earlier version, and where the average was begun after the cut."""
    case, first, second = TRAINED_CASES[0], SavesAverage(False), SavesAverage(False)
    _, trainer = averaged_run(tmp_path, case, first)
    trainer.add_callback(StopAt(6))
    trainer.train()
    (tmp_path / "checkpoint-6" / AVERAGES_NAME).unlink()
    _, trainer = averaged_run(tmp_path, case, second)
    trainer.train(resume_from_checkpoint=True)
    sizes = {layer.state_size for layer in find_layers(second.average.module)}
    assert sizes == {layer.state_size for layer in find_layers(trainer.model)} == {8}
    assert "no average of the weights from before the cut" in caplog.text


def test_a_lost_snapshot_leaves_the_cut_as_it_is_and_says_so(tmp_path, caplog) -> None:
    saves = {"save_strategy": "steps", "save_steps": 6}
    _, first = run(tmp_path, judged(**SLOW), Judge(8), **saves)
    first.add_callback(StopAt(6))
    first.train()
    (tmp_path / "checkpoint-6" / SNAPSHOT_NAME).unlink()
    _, second = run(tmp_path, judged(**SLOW), Judge(8), **saves)
    second.train(resume_from_checkpoint=True)
    assert second.model.config.state_size == 4
    assert "can no longer be taken back" in caplog.text


def test_the_pragmatic_strategy_needs_no_evaluation(tmp_path) -> None:
    """By default the calibration loss decides, at the cut."""
    calls = []

    def loss(model, batch):
        calls.append(model.config.state_size)
        return model(**batch).loss + (0.03 if model.config.state_size < 4 else 0.0)

    callback = CompreSSMCallback({"strategy": "pragmatic", "window": [0, 12], "interval": 4}, loss_function=loss)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert [r.outcome for r in callback.records] == ["cut", "cut", "rolled_back"]
    assert trainer.model.config.state_size == 4 and calls[1:] == [8, 4, 4, 2]
    assert calls[0] == 8, "before the first step, to see that there is a loss"


@pytest.mark.parametrize(
    "settings, overrides, message",
    [
        ({}, {"eval_strategy": "no"}, "eval_strategy is 'no'"),
        ({"rollback_metric": "accuracy"}, {}, "gives no 'eval_accuracy': it gives .*eval_loss"),
    ],
)
def test_a_metric_that_never_comes_is_refused_before_anything_is_cut(settings, overrides, message, tmp_path) -> None:
    _, trainer = run(tmp_path, judged(**settings), Judge(8), **overrides)
    with pytest.raises(ConfigurationError, match=message):
        trainer.train()
    assert trainer.model.config.state_size == 8


def test_the_figures_after_a_rollback_are_finite(tmp_path) -> None:
    _, trainer = run(tmp_path, judged(), Judge(least=8))
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert math.isfinite(trainer.model(**token_batch()).loss.item())


@pytest.mark.parametrize(
    "saved",
    [
        {"before": "0.5", "judge_at": 4},
        {"before": 0.5, "judge_at": "4"},
        {"judge_at": 4},
        {"before": 0.5, "judge_at": []},
        1,
    ],
)
def test_a_saved_judgement_of_another_kind_is_refused(saved) -> None:
    callback = CompreSSMCallback(CompreSSMConfig(strategy="fixed"))
    entry = {"args": {}, "attributes": {"saved_records": [], "saved_judgement": saved}}
    state = TrainerState(global_step=3, stateful_callbacks={"CompreSSMCallback": entry})
    with pytest.raises(InconsistentModelError, match="trainer_state.json of the checkpoint of step 3 cannot be read"):
        saved_run(state, callback)
