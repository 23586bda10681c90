"""What the Trainer can do must go on working across a cut."""

from __future__ import annotations

import copy
import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.errors import UnsupportedModelError
from tests.cases import TRAINED_CASES, case_id, logits_of, tiny_mamba, token_batch
from tests.training.test_callback import HALF, STEPS, Notes, Rows, arguments, make_trainer
from tests.training.test_resume import SAVES, TWO_CUTS, StopAt


@pytest.fixture(autouse=True)
def _compiles_anew():
    yield
    torch._dynamo.reset()


def state_sizes(model: nn.Module) -> set[int]:
    return {layer.state_size for layer in find_layers(model)}


def test_torch_compile_recompiles_once_for_a_cut(tmp_path) -> None:
    eager, compiled = Notes(), Notes()
    make_trainer(tmp_path / "a", CompreSSMCallback(HALF), callbacks=[eager], logging_steps=1).train()
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "logging_steps": 1}
    trainer = make_trainer(tmp_path / "b", CompreSSMCallback(HALF), callbacks=[compiled], **settings)
    trainer.train()
    assert state_sizes(trainer.model) == {4}
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-3)


class Heavy(nn.Module):
    """Runs out of memory, as a GPU would, where a batch has more than two rows in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_mamba()
        self.config = self.inner.config

    def forward(self, input_ids, labels=None):
        if self.training and len(input_ids) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(input_ids=input_ids, labels=labels)


def test_auto_find_batch_size_starts_again_with_a_smaller_batch(tmp_path) -> None:
    callback, model = CompreSSMCallback(HALF), Heavy()
    trainer = make_trainer(tmp_path, callback, model, auto_find_batch_size=True, per_device_train_batch_size=8)
    result = trainer.train()
    assert result.global_step == STEPS and trainer._train_batch_size <= 2
    assert [(r.step, r.outcome) for r in callback.records] == [(2, "cut")] and state_sizes(model) == {4}


class Ragged(Dataset):
    """Sequences of different lengths."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)
        tokens = torch.arange(4 + index % 7) % 20
        return {"input_ids": tokens, "labels": tokens}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def test_a_sampler_that_groups_by_length(tmp_path) -> None:
    callback = CompreSSMCallback(HALF)
    trainer = Trainer(
        model=tiny_mamba(),
        args=arguments(tmp_path, train_sampling_strategy="group_by_length"),
        train_dataset=Ragged(),
        data_collator=padded,
        callbacks=[callback],
    )
    assert math.isfinite(trainer.train().training_loss)
    assert callback.records[0].outcome == "cut"


class KeepsAverage(TrainerCallback):
    """An exponential moving average of the weights, kept as torch's own class or as plain tensors."""

    def __init__(self, plain: bool) -> None:
        self.plain, self.average, self.tensors = plain, None, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.plain:
            self.tensors.update({name: p.detach().clone() for name, p in model.named_parameters()})
        else:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.plain:
            for name, parameter in model.named_parameters():
                self.tensors[name].lerp_(parameter.detach(), 0.5)
        else:
            self.average.update_parameters(model)

    def averaged_into(self, model: nn.Module) -> nn.Module:
        if not self.plain:
            return self.average.module
        twin = copy.deepcopy(model)
        twin.load_state_dict(self.tensors, strict=False)
        return twin


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
@pytest.mark.parametrize("plain", [False, True])
def test_an_average_of_the_weights_is_cut_with_them(case, plain: bool, tmp_path) -> None:
    keeper = KeepsAverage(plain)
    callback = CompreSSMCallback(HALF, averaged_weights=[keeper.tensors] if plain else ())
    batch = case.batch()
    differences = []

    class Compare(TrainerCallback):
        """The average follows the model closely, before the cut and after it."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            average = keeper.averaged_into(model)
            difference = (logits_of(average, batch) - logits_of(model, batch)).norm() / logits_of(model, batch).norm()
            differences.append(float(difference))
            model.train()

    model, rows = case.build(), Rows(case.batch(batch=64))
    make_trainer(tmp_path, None, model, rows, [keeper, callback, Compare()], learning_rate=1e-4).train()
    assert state_sizes(model) == {4} and state_sizes(keeper.averaged_into(model)) == {4}
    assert max(differences) < 0.05, differences


def test_a_teacher_or_a_backup_in_another_callback_is_left_alone(tmp_path) -> None:
    other = TrainerCallback()
    model = tiny_mamba()
    other.teacher, other.backup = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    make_trainer(tmp_path, CompreSSMCallback(HALF), model, callbacks=[other]).train()
    assert state_sizes(model) == {4} and state_sizes(other.teacher) == {8}
    assert other.backup["backbone.layers.0.mixer.A_log"].shape == (32, 8)


def test_every_trial_of_a_hyperparameter_search_starts_from_a_fresh_model(tmp_path) -> None:
    pytest.importorskip("optuna")
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in (1, 2):
                seen.append((state.global_step, *state_sizes(model)))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen.append(("best", *state_sizes(model)))

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(
        model_init=lambda trial: tiny_mamba(),
        args=arguments(tmp_path, max_steps=4, load_best_model_at_end=True, metric_for_best_model="loss", **settings),
        train_dataset=Rows(token_batch(batch=32)),
        eval_dataset=Rows(token_batch(batch=4)),
        callbacks=[CompreSSMCallback(CompreSSMConfig(strategy="fixed", window=(0, 2))), Watch()],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    assert math.isfinite(best.objective)
    # The best checkpoint of each trial is that of step 1, from before the cut.
    assert seen == [(1, 8), (2, 4), ("best", 8)] * 2


def test_early_stopping_goes_back_to_the_best_model_whatever_its_size(tmp_path) -> None:
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = 1.0 if state.global_step < 4 else 2.0

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = tiny_mamba()
    trainer = make_trainer(
        tmp_path,
        CompreSSMCallback(CompreSSMConfig(strategy="fixed", window=(0, 4))),
        model,
        callbacks=[Judge(), EarlyStoppingCallback(early_stopping_patience=4)],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        **settings,
    )
    result = trainer.train()
    assert result.global_step == 5 and state_sizes(model) == {8}, "the best one was seen at step 1"


def test_a_second_training_after_the_best_model_was_larger(tmp_path) -> None:
    """The optimizer's moments are those of the small model; fused AdamW would read beyond them."""

    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = tiny_mamba()
    trainer = make_trainer(
        tmp_path, CompreSSMCallback(HALF), model, callbacks=[Judge()], load_best_model_at_end=True, **settings
    )
    trainer.train()
    assert state_sizes(model) == {8}
    optimizer = trainer.optimizer
    assert math.isfinite(trainer.train().training_loss)
    assert trainer.optimizer is optimizer or trainer.optimizer is not None


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path) -> None:
    model = tiny_mamba(tie_word_embeddings=tied)
    make_trainer(tmp_path, CompreSSMCallback(HALF), model, save_strategy="steps", save_steps=STEPS).train()
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    loaded = type(model).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(model, token_batch()))


def test_save_only_model_and_a_limit_of_checkpoints(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True, "save_total_limit": 2}
    make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), callbacks=[StopAt(12)], **settings).train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    model = tiny_mamba()
    make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), model, **settings).train(resume_from_checkpoint=True)
    assert state_sizes(model) == {2}
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]


def with_adapter(targets: list[str]):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_mamba(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_an_adapter_on_other_modules_trains_on_across_a_cut(tmp_path) -> None:
    model = with_adapter(["in_proj"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    notes = Notes()
    make_trainer(tmp_path, CompreSSMCallback(HALF), model, callbacks=[notes]).train()
    assert state_sizes(model) == {4} and all(math.isfinite(loss) for loss in notes.losses)
    assert all(not p.requires_grad for name, p in model.named_parameters() if name in frozen)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert loaded.config.state_size == 4
    torch.testing.assert_close(logits_of(loaded, token_batch()), logits_of(merged, token_batch()))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_with_an_adapter_resumes_with_the_cut_of_its_frozen_base(stop: int, tmp_path) -> None:
    """The Trainer saves the adapter alone; what a cut made of the base has to be saved beside it."""
    whole, rest = Notes(), Notes()
    targets = ["in_proj"]
    make_trainer(
        tmp_path / "a", CompreSSMCallback(TWO_CUTS), with_adapter(targets), None, [whole], logging_steps=1
    ).train()
    first = make_trainer(
        tmp_path / "b",
        CompreSSMCallback(TWO_CUTS),
        with_adapter(targets),
        None,
        [StopAt(stop)],
        **SAVES | {"lr_scheduler_type": "linear"},
    )
    first.train()
    second = make_trainer(
        tmp_path / "b",
        CompreSSMCallback(TWO_CUTS),
        with_adapter(targets),
        None,
        [rest],
        **SAVES | {"lr_scheduler_type": "linear"},
    )
    second.train(resume_from_checkpoint=True)
    assert state_sizes(second.model) == {2}
    assert rest.losses[-(STEPS - stop) :] == pytest.approx(whole.losses[stop:], rel=1e-4)


def test_an_adapter_on_a_tensor_that_would_be_cut_is_refused(tmp_path) -> None:
    model = with_adapter(["x_proj"])
    with pytest.raises(UnsupportedModelError, match="Leave x_proj out of the adapter's target modules"):
        make_trainer(tmp_path, CompreSSMCallback(HALF), model).train()


def test_fp16_with_a_gradient_scaler(tmp_path) -> None:
    """The calibration takes part in the Trainer's own autocast; the scaler's state goes on."""
    callback, notes = CompreSSMCallback(HALF), Notes()
    try:
        trainer = make_trainer(tmp_path, callback, callbacks=[notes], fp16=True)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"this machine has no fp16 training: {error}")
    trainer.train()
    assert callback.records[0].outcome == "cut" and math.isfinite(callback.records[0].loss_after)
    assert all(math.isfinite(loss) for loss in notes.losses)


_TRACKED = """
import sys
from pathlib import Path
from hf_compressm import CompreSSMCallback
from tests.training.test_callback import HALF, make_trainer
make_trainer(Path(sys.argv[1]), CompreSSMCallback(HALF), report_to=["trackio"], project="across-a-cut").train()
"""


def test_trackio_gets_the_figures(tmp_path) -> None:
    """In a process of its own, as trackio reads where to write when it is imported."""
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _TRACKED, str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    (database,) = [path for path in (tmp_path / "trackio").rglob("*.db") if "across" in path.name]
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    found = [row for row in rows if any("compressm/state_size" in key for key in row)]
    sizes = [row["train/compressm/state_size"] for row in found]
    assert sizes[0] == 8 and sizes[-1] == 4 and len(sizes) > 2, "a curve"
