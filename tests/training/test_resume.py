"""Resuming from checkpoints of another state size, with the plain Trainer."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import load_sharded_checkpoint

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.training.resume import follow_checkpoints
from tests.cases import TRAINED_CASES, case_id, logits_of, tiny_mamba, token_batch
from tests.selective_models import tiny_falcon_mamba, tiny_mamba2
from tests.training.test_callback import Notes, Rows, make_trainer

TWO_CUTS = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0.0, 0.5), interval=5)


class StopAt(TrainerCallback):
    """Ends a run early, as a crash after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


SAVES = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module", params=TRAINED_CASES, ids=case_id)
def uninterrupted(request, tmp_path_factory):
    """A model's whole run: its case, its Trainer and the notes taken."""
    case, notes = request.param, Notes()
    trainer = make_trainer(
        tmp_path_factory.mktemp("whole"),
        CompreSSMCallback(TWO_CUTS),
        case.build(),
        Rows(case.batch(batch=64)),
        [notes],
        **{**SAVES, "save_strategy": "no"},
    )
    trainer.train()
    return case, trainer, notes


@pytest.mark.parametrize("stop, size, restore_callbacks", [(3, 8, False), (7, 4, False), (7, 4, True), (12, 2, False)])
def test_a_resumed_run_gives_the_losses_of_the_uninterrupted_one(
    uninterrupted, stop: int, size: int, restore_callbacks: bool, tmp_path
) -> None:
    case, reference, whole = uninterrupted
    rows, parts, rest = Rows(case.batch(batch=64)), Notes(), Notes()
    settings = {**SAVES, "save_steps": stop, "restore_callback_states_from_checkpoint": restore_callbacks}
    first = make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), case.build(), rows, [parts, StopAt(stop)], **settings)
    first.train()
    resumed_model = case.build()
    second = make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), resumed_model, rows, [rest], **settings)
    second.train(resume_from_checkpoint=True)

    assert {layer.state_size for layer in find_layers(first.model)} == {size}
    losses = parts.losses[:stop] + rest.losses[-(20 - stop) :]
    assert losses == pytest.approx(whole.losses, rel=1e-5)
    assert {layer.state_size for layer in find_layers(resumed_model)} == {2}
    callback = next(cb for cb in second.callback_handler.callbacks if isinstance(cb, CompreSSMCallback))
    expected = next(cb for cb in reference.callback_handler.callbacks if isinstance(cb, CompreSSMCallback))
    assert [(r.step, r.outcome) for r in callback.records] == [(5, "cut"), (10, "cut")]
    for found, wanted in zip(callback.records, expected.records):
        assert found.loss_after == pytest.approx(wanted.loss_after, rel=1e-5)
        for a, b in zip(found.layers, wanted.layers):
            assert a.rank_correlation == pytest.approx(b.rank_correlation) if b.rank_correlation else True
    for (name, a), b in zip(reference.model.state_dict().items(), resumed_model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sharded_checkpoint_is_resumed_from(tmp_path) -> None:
    settings = {**SAVES, "save_steps": 7}
    first = make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), callbacks=[StopAt(7)], **settings)
    first.train()
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "model.safetensors").unlink()
    first.model.save_pretrained(checkpoint, max_shard_size="4KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 3
    model = tiny_mamba()
    make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), model, **settings).train(resume_from_checkpoint=True)
    assert model.config.state_size == 2


@pytest.mark.parametrize("best_step, size", [(3, 8), (7, 4), (20, 2)])
def test_the_best_checkpoint_is_loaded_whatever_its_size(best_step: int, size: int, tmp_path) -> None:
    model = tiny_mamba()

    class Judge(TrainerCallback):
        """Lets one step look best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = 0.0 if state.global_step == best_step else 1.0 + state.global_step

    trainer = make_trainer(
        tmp_path,
        CompreSSMCallback(TWO_CUTS),
        model,
        callbacks=[Judge()],
        **{**SAVES, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2},
    )
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == best_step:
                kept.update(copy.deepcopy(model.state_dict()))

    trainer.add_callback(Keep())
    trainer.train()
    assert model.config.state_size == size
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_checkpoint_of_a_run_without_the_callback_is_resumed_from_with_it(tmp_path) -> None:
    make_trainer(tmp_path, callbacks=[StopAt(2)], **SAVES).train()
    model = tiny_mamba()
    callback = CompreSSMCallback(TWO_CUTS)
    make_trainer(tmp_path, callback, model, **SAVES).train(resume_from_checkpoint=True)
    assert model.config.state_size == 2 and [record.step for record in callback.records] == [5, 10]


def test_loading_resizes_both_ways_and_keeps_the_parameters_identity() -> None:
    small, model = tiny_mamba(state_size=3, seed=1), tiny_mamba(state_size=8)
    follow_checkpoints(model)
    follow_checkpoints(model)
    assert all(len(layer.module._load_state_dict_pre_hooks) == 1 for layer in find_layers(model))
    identities = [id(parameter) for parameter in model.parameters()]
    model.load_state_dict(small.state_dict())
    assert torch.equal(logits_of(model, token_batch()), logits_of(small, token_batch()))
    assert model.config.state_size == 3
    model.load_state_dict(tiny_mamba(state_size=8).state_dict())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert model.config.state_size == 8


def test_a_copied_model_follows_checkpoints_by_itself() -> None:
    model = tiny_mamba()
    follow_checkpoints(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(tiny_mamba(state_size=3).state_dict())
    assert twin.config.state_size == 3 and model.config.state_size == 8
    assert model.backbone.layers[0].mixer.A_log.shape[1] == 8


@pytest.mark.parametrize("shard_size", ["1KB", "4KB"])
@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("build", [tiny_mamba, tiny_falcon_mamba, tiny_mamba2], ids=lambda build: build.__name__)
def test_a_checkpoint_in_shards_brings_the_form_of_its_whole_index(
    build, stock, shard_size, tmp_path, monkeypatch
) -> None:
    """Whatever order the shards come in, and wherever the tensors of one layer lie."""
    # transformers collects garbage after every shard: of all that a test process holds, half a second each time.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    batch = token_batch()
    model = build()
    compress(model, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=0.5, stock=stock))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = build(seed=1)
    follow_checkpoints(again)
    load_sharded_checkpoint(again, str(tmp_path), strict=False)
    assert {layer.state_size for layer in find_layers(again)} == {4}
    assert type(again) is type(model)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    load_sharded_checkpoint(again, str(tmp_path), strict=False)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
