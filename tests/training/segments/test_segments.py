"""Training in segments, as far as one process can tell; tests/distributed has the sharded runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, train_in_segments
from hf_compressm.errors import ConfigurationError, UnsupportedModelError
from hf_compressm.training.segments import train as segments
from hf_compressm.training.segments.checkpoint import fresh_state
from hf_compressm.training.segments.fsdp import FSDPCheckpoint, nested
from tests.cases import VOCABULARY, tiny_mamba

SETTINGS = {"strategy": "fixed", "keep_ratio": 0.5, "window": (0, 2)}


def make_trainer(folder, callbacks=True, config=None, averaged_weights=(), **settings) -> Trainer:
    tokens = torch.randint(0, VOCABULARY, (32, 10), generator=torch.Generator().manual_seed(3)).tolist()
    dataset = Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")
    args = TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_steps=2, **settings,
    )  # fmt: skip
    callback = CompreSSMCallback(CompreSSMConfig(**{**SETTINGS, **(config or {})}), averaged_weights=averaged_weights)
    return Trainer(
        model=tiny_mamba(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[callback] if callbacks else [],
    )


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters()]


def test_in_one_process_it_is_the_plain_training(tmp_path) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    helped = train_in_segments(partial(make_trainer, tmp_path / "helped"), resume_from_checkpoint=True)
    resumed = train_in_segments(partial(make_trainer, tmp_path / "plain"), tmp_path / "plain" / "checkpoint-2")
    for trainer in (helped, resumed):
        assert trainer.model.config.state_size == 4
        assert all(torch.equal(one, other) for one, other in zip(parameters(plain), parameters(trainer)))


def test_fsdp_that_shards_nothing_is_cut_in_place(tmp_path, monkeypatch) -> None:
    # As `accelerate launch` with an FSDP config does on a machine with one CPU.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedModelError, match="train_in_segments"):
        make_trainer(tmp_path).train()
    trainer = train_in_segments(partial(make_trainer, tmp_path))
    assert trainer.model.config.state_size == 4 and trainer.state.global_step == 4


def test_the_trainer_needs_the_callback(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="0 CompreSSMCallbacks"):
        train_in_segments(partial(make_trainer, tmp_path, callbacks=False))


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (lambda folder: None, "make_trainer is None; give a function"),
        (lambda folder: make_trainer(folder), "make_trainer is a Trainer; give a function"),
        (lambda folder: lambda: None, "make_trainer returns None; let it return a new Trainer"),
        (lambda folder: lambda: 3, "make_trainer returns 3; let it return a new Trainer"),
    ],
    ids=["nothing", "a Trainer", "returns nothing", "returns a number"],
)
def test_what_makes_no_trainer_is_refused(tmp_path, maker, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train_in_segments(maker(tmp_path))


@pytest.mark.parametrize(("given", "told"), [(8, "8"), (0, "0"), (1.5, "1.5"), (["checkpoint-2"], "a list")])
def test_what_names_no_checkpoint_is_refused_before_a_trainer_is_made(given, told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"resume_from_checkpoint is {told}; give a checkpoint's folder"):
        train_in_segments(lambda: pytest.fail("a Trainer was made"), resume_from_checkpoint=given)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}, "load_best_model_at_end"),
        ({"save_only_model": True}, "save_only_model"),
        ({"config": {"rollback_metric": "loss", "rollback_tolerance": 1.0}}, "rollback_metric"),
        ({"averaged_weights": [tiny_mamba()]}, "averaged_weights"),
    ],
)
def test_what_segments_cannot_do_is_refused(tmp_path, settings, named) -> None:
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises(ConfigurationError, match=named):
        segments._require_segments(trainer, segments._callback_of(trainer))


def test_a_check_after_the_last_step_is_refused(tmp_path) -> None:
    trainer = make_trainer(tmp_path, config={"window": (0, 4)})
    callback = segments._callback_of(trainer)
    callback.pause_at_checks({"layer": 8})
    with pytest.raises(ConfigurationError, match="a segment after it"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_segment_ends_at_its_check_and_saves(tmp_path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=3)
    callback = segments._callback_of(trainer)
    callback.pause_at_checks({"layer": 8})
    trainer.train()
    assert callback.is_paused and trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2]
    # The next training of the same callback is one like any other.
    make_trainer(tmp_path / "other").train()
    assert trainer.model.config.state_size == 8


def test_a_checkpoint_of_another_kind_is_refused(tmp_path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UnsupportedModelError, match="FULL_STATE_DICT"):
        FSDPCheckpoint(tmp_path / "checkpoint-2")


def test_the_state_of_a_new_parameter_is_that_before_its_first_step() -> None:
    state = {"step": torch.tensor(7.0), "exp_avg": torch.ones(4), "count": 3}
    fresh = fresh_state(torch.ones(2, 3), torch.ones(4), state)
    assert fresh["step"] == 0 and fresh["count"] == 0 and torch.equal(fresh["exp_avg"], torch.zeros(2, 3))
    assert fresh_state(torch.ones(2, 3), torch.ones(4), state, same_step=True)["step"] == 7
    with pytest.raises(UnsupportedModelError, match="row"):
        fresh_state(torch.ones(2, 3), torch.ones(4, 5), {"row": torch.ones(4)})


def test_paths_become_dictionaries_and_lists() -> None:
    entries = {("state", "a.b", "step"): 1, ("groups", 1, "lr"): 2, ("groups", 0, "lr"): 3}
    assert nested(entries) == {"state": {"a.b": {"step": 1}}, "groups": [{"lr": 3}, {"lr": 2}]}
