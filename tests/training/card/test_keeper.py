"""The card in a training run: with every save, in the Trainer's own card, and true to what happened."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from transformers import MambaForCausalLM

from hf_compressm import CompreSSMCallback, read_history
from hf_compressm.cards import PICTURE_NAME
from hf_compressm.compression import CheckRecord, LayerRecord
from hf_compressm.errors import InconsistentModelError
from hf_compressm.training.card.evaluations import evaluations
from hf_compressm.training.card.keeper import CardKeeper, keep_card
from hf_compressm.training.card.step_clock import StepClock
from hf_compressm.training.trainer_lookup import find_trainers
from tests.cases import ModelWithMambaInside, real_valued_batch, tiny_mamba
from tests.training.test_callback import HALF, Rows, make_trainer

FILES = {"README.md", "compressm_history.json", PICTURE_NAME}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with evaluations and checkpoints whose state was halved at step 2 of 20."""
    folder = tmp_path_factory.mktemp("run")
    callback = CompreSSMCallback(HALF)
    trainer = make_trainer(folder, callback, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=10)
    trainer.train()
    return trainer, callback, folder


def test_save_model_writes_the_card_wherever_it_saves(trained, tmp_path) -> None:
    trainer, callback, _ = trained
    trainer.save_model(str(tmp_path / "smaller"))
    assert set(os.listdir(tmp_path / "smaller")) >= {*FILES, "config.json", "model.safetensors"}
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert "step 2" in card and "from 8 to 4 states" in card and 'from_pretrained("smaller")' in card
    assert read_history(tmp_path / "smaller") == callback.records
    assert MambaForCausalLM.from_pretrained(tmp_path / "smaller").config.state_size == 4


def test_every_checkpoint_has_the_card_of_its_moment(trained) -> None:
    _, _, folder = trained
    for step in (10, 20):
        assert set(os.listdir(folder / f"checkpoint-{step}")) >= FILES


def test_the_evaluation_before_and_after_the_cut_is_in_the_card(trained, tmp_path) -> None:
    trainer, _, _ = trained
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    [found] = trainer.callback_handler.callbacks[-1].provenance().evaluations
    assert (found.metric, found.before, found.after) == ("loss", logged[1], logged[20])
    trainer.save_model(str(tmp_path))
    assert f"{logged[1]:.4f}" in (tmp_path / "README.md").read_text()


def test_the_trainers_own_card_keeps_the_section_and_a_persons_text(trained) -> None:
    trainer, _, folder = trained
    trainer.create_model_card(model_name="run", tags="digits")
    card = (folder / "README.md").read_text()
    assert "Training hyperparameters" in card and "## Compression of the state" in card and "- digits" in card
    (folder / "README.md").write_text(card.replace("More information needed", "It reads digits."))
    trainer.create_model_card(model_name="run")
    again = (folder / "README.md").read_text()
    assert "It reads digits." in again and again.count("## Compression of the state") == 1


def test_the_model_carries_its_card_after_training(trained, tmp_path) -> None:
    trainer, _, _ = trained
    trainer.model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) >= FILES


def test_a_checkpoint_that_is_not_one_model_is_not_pushed(trained) -> None:
    trainer, _, folder = trained
    config = folder / "checkpoint-20" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"state_size": 4', '"state_size": 8'))
    try:
        with pytest.raises(InconsistentModelError, match="not one model"):
            trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    finally:
        config.write_text(text)


def test_a_push_waits_for_the_upload_of_another_size(trained) -> None:
    trainer, _, _ = trained
    waited = []

    class Upload:
        def wait_until_done(self) -> None:
            waited.append(trainer.state.global_step)

    [keeper] = [found for found in trainer.callback_handler.callbacks if isinstance(found, CardKeeper)]
    keeper._changes_pushed = 0
    trainer.push_in_progress = Upload()
    for _ in range(2):
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert waited == [20], "once for the cut, and not again"


def test_a_module_of_the_users_own_gets_a_card_too(tmp_path) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path / "run", CompreSSMCallback(HALF), ModelWithMambaInside(), Rows(real_valued_batch(batch=64))
    )
    trainer.eval_dataset = None
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert set(os.listdir(tmp_path / "saved")) >= FILES
    assert "ModelWithMambaInside" in (tmp_path / "saved" / "README.md").read_text()


def test_a_run_without_any_check_writes_no_card(tmp_path) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF))
    trainer.save_model(str(tmp_path / "before"))
    assert not FILES & set(os.listdir(tmp_path / "before"))


def test_one_keeper_a_callback_however_it_came_to_the_trainer(tmp_path) -> None:
    found = []

    class Looking(CompreSSMCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            found.extend(find_trainers(self))
            return super().on_train_begin(args, state, control, **kwargs)

    trainer = make_trainer(tmp_path)
    callback = Looking(HALF)
    keep_card(callback)
    trainer.add_callback(callback)
    trainer.train()
    assert found == [trainer]
    trainer.train()
    keepers = [found for found in trainer.callback_handler.callbacks if isinstance(found, CardKeeper)]
    assert len(keepers) == 1 and keepers[0].owner is callback


def test_a_trainer_is_let_go(tmp_path) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), model=tiny_mamba())
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


def test_the_clock_leaves_out_cuts_pauses_and_the_start() -> None:
    times = iter([0, 9, 18, 27, 28, 29, 30, 130, 230, 330, 430, 430.5, 431, 500, 500.5])
    clock = StepClock(now=lambda: next(times))
    for _ in range(7):
        clock.tick(cuts=0)
    assert clock.before_and_after() is None
    for _ in range(6):
        clock.tick(cuts=1)
    clock.pause()
    clock.tick(cuts=1)
    clock.tick(cuts=1)
    assert clock.before_and_after() == (1, 0.5)


def test_only_qualities_count_as_evaluations() -> None:
    layer = LayerRecord("a", "mamba", 8, 4, 4, [1.0], 0.0, 0.0)
    records = [CheckRecord("cut", "", [layer], 5)]
    log = [
        {"eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 4},
        {"eval_accuracy": 0.6, "eval_runtime": 1.0, "eval_samples_per_second": 3.0, "epoch": 1.0, "step": 5},
        {"loss": 1.0, "step": 6},
    ]
    [found] = evaluations(log, records, "the evaluation set")
    assert (found.metric, found.before, found.after) == ("accuracy", 0.5, 0.6)
    assert evaluations(log[:1], records, "x") == () and evaluations(log, [], "x") == ()
