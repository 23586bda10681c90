"""`load_best_model_at_end` may go back past a cut: model, history, card and what may be pushed agree afterwards."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, read_history
from hf_compressm.architectures import find_layers
from hf_compressm.compression import CheckRecord, LayerRecord, sizes_after
from hf_compressm.saving import require_one_model
from hf_compressm.training.best_model import records_of_best
from tests.cases import MIXED_ONLY, TRAINED_CASES, Case, case_id
from tests.training.test_callback import Rows, make_trainer

CUTS = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0, 8), interval=4)
SAVES = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 10}


class BestAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(abs(state.global_step - self.step))


def trained(folder, best: int, case=TRAINED_CASES[0], config=CUTS):
    callback, rows = CompreSSMCallback(config), Rows(case.batch(batch=64))
    settings = {**SAVES, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = make_trainer(folder, None, case.build(), rows, [BestAt(best), callback], **settings)
    trainer.eval_dataset = Rows(case.batch(batch=4, seed=3))
    trainer.train()
    return trainer, callback


# Every family returns to the form between its cuts, a folded and a mixed one also to the first and to the last form.
RETURNS = [
    *((case, 5, 4) for case in TRAINED_CASES),
    *((case, best, size) for case in (TRAINED_CASES[0], MIXED_ONLY) for best, size in ((2, 8), (9, 2))),
]


def _id(value: Case | int) -> str:
    return case_id(value) if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("case, best, size", RETURNS, ids=_id)
def test_history_card_and_push_know_of_the_return(case, best: int, size: int, tmp_path) -> None:
    trainer, callback = trained(tmp_path / "run", best, case)
    assert {layer.state_size for layer in find_layers(trainer.model)} == {size}
    assert set(sizes_after(callback.records).values()) == {size}
    assert read_history(tmp_path / "run") == callback.records
    outcomes = [record.outcome for record in callback.records]
    assert outcomes == ["cut", "cut", *["rolled_back"] * {8: 2, 4: 1, 2: 0}[size]]
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert set(sizes_after(read_history(folder)).values()) == {size}
    card = (folder / "README.md").read_text()
    assert ("cut nothing" in card) == (size == 8)
    assert size in (8, 2) or "from 8 to 4 states" in card
    if size > 2:
        assert f"checkpoint-{best}" in card
    if case.is_pretrained_model:
        require_one_model(folder, type(trainer.model), sizes_after(callback.records))
        trainer.save_model(str(tmp_path / "run"))
        trainer.create_model_card(model_name="run")  # refuses a folder that is not one model


def test_the_card_tells_what_the_best_model_reached(tmp_path) -> None:
    trainer, _ = trained(tmp_path, best=5)
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    [found] = trainer.callback_handler.callbacks[-1].provenance().evaluations
    assert (found.before, found.after) == (logged[3], logged[5])
    trainer.eval_dataset = trainer.train_dataset
    trainer.evaluate()
    [found] = trainer.callback_handler.callbacks[-1].provenance().evaluations
    assert found.after == trainer.state.log_history[-1]["eval_loss"] != logged[5]


def test_a_cut_that_was_not_judged_yet_goes_too(tmp_path) -> None:
    judged = {"rollback_after": 6, "rollback_tolerance": 9, "rollback_metric": "eval_loss"}
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0, 4), **judged)
    trainer, callback = trained(tmp_path, best=2, config=config)
    assert trainer.model.config.state_size == 8
    assert [record.outcome for record in callback.records] == ["cut", "rolled_back"]


def record(outcome: str, step: int, before: int, after: int) -> CheckRecord:
    layers = [LayerRecord("a", "mamba", before, after, after, [1.0], 0.0, 0.0)]
    return CheckRecord(outcome, "", layers, step, parameters_before=before, parameters_after=after)


def test_a_return_may_lead_back_into_a_cut_that_was_taken_back_later() -> None:
    records = [record("cut", 4, 8, 4), record("rolled_back", 6, 4, 8), record("cut", 8, 8, 6)]
    added = records_of_best(records, best=5, step=10)
    found = [(each.outcome, each.layers[0].size_before, each.layers[0].size_after, each.step) for each in added]
    assert found == [("rolled_back", 6, 8, 10), ("cut", 8, 4, 10)]
    assert all("checkpoint-5" in each.reason for each in added)
    assert records_of_best(records, best=9, step=10) == []
