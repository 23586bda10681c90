"""The callback in the real Trainer."""

from __future__ import annotations

import gc
import json
import logging
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, fast_cpu_scan, read_history
from hf_compressm.architectures import fast_cpu_scan_enabled, find_layers
from hf_compressm.errors import ConfigurationError, UnsupportedModelError
from tests.cases import CASES, case_id, logits_of, tiny_mamba, token_batch

STEPS = 20
HALF = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0.0, 0.1))


class Rows(Dataset):
    """The rows of one big batch."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


class Stream(IterableDataset):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self):
        yield from (self.rows[i % len(self.rows)] for i in range(10_000))


def arguments(folder, **overrides) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 5,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **overrides})


def make_trainer(folder, callback=None, model=None, rows=None, callbacks=(), **overrides) -> Trainer:
    return Trainer(
        model=model if model is not None else tiny_mamba(),
        args=arguments(folder, **overrides),
        train_dataset=rows if rows is not None else Rows(token_batch(batch=64)),
        eval_dataset=Rows(token_batch(batch=4, seed=3)),
        callbacks=[*([callback] if callback else []), *callbacks],
    )


class Notes(TrainerCallback):
    """Notes the losses and the learning rates."""

    def __init__(self) -> None:
        self.losses, self.rates, self.sizes = [], [], []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.rates.append(logs["learning_rate"])
            self.sizes.append(find_layers(model)[0].state_size)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_run_is_cut_at_the_scheduled_step_and_goes_on(case, tmp_path) -> None:
    model, rows = case.build(), Rows(case.batch(batch=64))
    callback = CompreSSMCallback(HALF)
    trainer = make_trainer(tmp_path, callback, model, rows)
    result = trainer.train()
    assert result.global_step == STEPS and math.isfinite(result.training_loss)
    (record,) = callback.records
    assert (record.outcome, record.step) == ("cut", 2)
    assert {layer.size_after for layer in record.layers} == {4}
    assert read_history(tmp_path) == [record]


def test_the_stock_class_loads_what_the_trainer_saved(tmp_path) -> None:
    model = tiny_mamba()
    trainer = make_trainer(tmp_path / "run", CompreSSMCallback(HALF), model, save_strategy="steps", save_steps=10)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-20"):
        loaded = MambaForCausalLM.from_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["state_size"] == loaded.config.state_size == 4
        assert torch.equal(logits_of(loaded, token_batch()), logits_of(model, token_batch()))


@pytest.mark.parametrize(
    "optim, extra",
    [
        ("adamw_torch_fused", {}),
        ("adamw_torch", {}),
        ("sgd", {"optim_args": "momentum=0.9"}),
        ("adafactor", {}),
        ("rmsprop", {}),
    ],
)
def test_every_common_optimizer_goes_on_with_its_moments(optim: str, extra: dict, tmp_path, caplog) -> None:
    notes = Notes()
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), callbacks=[notes], optim=optim, logging_steps=1, **extra)
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("hf_compressm")]
    assert notes.sizes == [8] + [4] * (STEPS - 1), "the log of the step of the cut already sees the smaller model"
    assert len(notes.losses) == STEPS and all(math.isfinite(loss) for loss in notes.losses)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_the_learning_rate_schedule_goes_on(tmp_path) -> None:
    plain, cut = Notes(), Notes()
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "logging_steps": 1}
    make_trainer(tmp_path / "a", callbacks=[plain], **settings).train()
    make_trainer(tmp_path / "b", CompreSSMCallback(HALF), callbacks=[cut], **settings).train()
    assert plain.rates == cut.rates
    assert plain.losses[:2] == pytest.approx(cut.losses[:2], rel=1e-4), "same data order, same start"


def test_a_check_that_keeps_everything_does_not_disturb_the_run(tmp_path) -> None:
    """Data order, dropout masks and weights of a run with checks but no cut are those of a run without the callback."""
    torch.manual_seed(0)
    losses = []
    for name, config in (("a", None), ("b", CompreSSMConfig(tolerance=1e-9, window=(0.0, 0.5), interval=3))):
        notes = Notes()
        model = tiny_mamba()
        model.backbone.norm_f = nn.Sequential(model.backbone.norm_f, nn.Dropout(0.2))
        callback = None if config is None else CompreSSMCallback(config)
        make_trainer(tmp_path / name, callback, model, callbacks=[notes], logging_steps=1).train()
        losses.append(notes.losses)
        if callback:
            assert {record.outcome for record in callback.records} == {"kept"} and len(callback.records) == 3
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_a_stream_is_calibrated_on_what_was_just_trained(tmp_path) -> None:
    callback = CompreSSMCallback(HALF)
    make_trainer(tmp_path, callback, rows=Stream(Rows(token_batch(batch=64)))).train()
    assert [record.outcome for record in callback.records] == ["cut"]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"max_grad_norm": 0.1},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_trainer_features_work_across_a_cut(settings: dict, tmp_path) -> None:
    callback, notes = CompreSSMCallback(HALF), Notes()
    make_trainer(tmp_path, callback, callbacks=[notes], **settings).train()
    assert callback.records[0].outcome == "cut"
    assert len(notes.losses) == STEPS // 5 and all(math.isfinite(loss) for loss in notes.losses)


def test_evaluation_in_the_step_of_a_cut_sees_the_smaller_model(tmp_path) -> None:
    sizes = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            sizes.append((state.global_step, model.config.state_size, math.isfinite(metrics["eval_loss"])))

    trainer = Trainer(
        model=tiny_mamba(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=4),
        train_dataset=Rows(token_batch(batch=16)),
        eval_dataset=Rows(token_batch(batch=8, seed=1)),
        callbacks=[CompreSSMCallback(CompreSSMConfig(strategy="fixed", window=(0.0, 0.5))), Watch()],
    )
    trainer.train()
    assert sizes == [(1, 8, True), (2, 4, True), (3, 4, True), (4, 4, True)]


def test_figures_reach_tensorboard_and_the_log_history(tmp_path) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), report_to=["tensorboard"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "compressm/state_size" in entry]
    assert len(entries) == 1 and entries[0]["compressm/state_size"] == 4 and entries[0]["step"] == 2
    events = next(path for path in tmp_path.rglob("events.out.tfevents*")).parent
    reader = EventAccumulator(str(events)).Reload()
    # A curve from the beginning on; the two of step 2 are the check and the Trainer's own log, or the check alone.
    curve = [(event.step, event.value) for event in reader.Scalars("train/compressm/state_size")]
    assert curve[0] == (0, 8.0) and (2, 4.0) in curve
    assert reader.Scalars("train/compressm/loss_after")


def test_the_record_of_a_skipped_check_says_why_and_the_run_goes_on(tmp_path, caplog) -> None:
    def broken(model, batch):
        return torch.tensor(float("nan"))

    callback = CompreSSMCallback(HALF, loss_function=broken)
    model = tiny_mamba()
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        make_trainer(tmp_path, callback, model).train()
    record, *tried_again = read_history(tmp_path)
    assert record.outcome == "skipped" and "calibration loss is nan" in record.reason
    assert [again.outcome for again in tried_again] == ["skipped"] * 8 and "no further check is made" in caplog.text
    assert model.config.state_size == 8 and "skipped" in caplog.text


def test_given_batches_are_used(tmp_path) -> None:
    seen = []

    def loss(model, batch):
        seen.append(batch["input_ids"].shape[0])
        return model(**batch).loss

    callback = CompreSSMCallback(HALF, loss_function=loss, calibration_batches=[token_batch(batch=3)] * 2)
    make_trainer(tmp_path, callback).train()
    assert seen == [3] * 5, "one before the first step, then two batches, before and after the cut"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_one_line_for_a_person_with_progress_bars_and_without(tmp_path, capsys, disable_tqdm: bool) -> None:
    make_trainer(tmp_path, CompreSSMCallback(HALF), disable_tqdm=disable_tqdm).train()
    printed = capsys.readouterr()
    assert "[compressm] step 2: state size 8 -> 4 in 2 layers" in printed.out + printed.err


def test_other_processes_are_silent_and_write_nothing(tmp_path, capsys) -> None:
    class NotTheFirst(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    callback = CompreSSMCallback(HALF)
    make_trainer(tmp_path, None, callbacks=[NotTheFirst(), callback], disable_tqdm=False).train()
    printed = capsys.readouterr()
    assert callback.records[0].outcome == "cut"
    assert "[compressm]" not in printed.out + printed.err and "calibrating" not in printed.err
    assert not (tmp_path / "compressm_history.json").exists()


def test_a_second_training_compresses_again(tmp_path) -> None:
    callback = CompreSSMCallback(HALF)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    trainer.train()
    assert trainer.model.config.state_size == 2 and len(callback.records) == 1


def test_a_model_without_a_supported_layer_is_refused_before_training(tmp_path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(24, 4), nn.Linear(4, 24)

        def forward(self, input_ids, labels):
            return (nn.functional.cross_entropy(self.head(self.embed(input_ids)).flatten(0, 1), labels.flatten()),)

    with pytest.raises(UnsupportedModelError, match="Supported families: .*mamba.*. Found: "):
        make_trainer(tmp_path, CompreSSMCallback(), Plain()).train()


def test_an_empty_schedule_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="no check falls into the window"):
        make_trainer(tmp_path, CompreSSMCallback(CompreSSMConfig(interval=100))).train()


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_wrappers_that_only_the_launcher_names_are_refused(tmp_path, monkeypatch, variable: str, name: str) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback())
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UnsupportedModelError, match=f"uses {name}"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_processes_that_torch_does_not_connect_are_refused_before_training(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback())
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(UnsupportedModelError, match="runs in 2 processes"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_settings_of_another_type_are_refused() -> None:
    assert CompreSSMCallback({"tolerance": 0.1}).config == CompreSSMConfig(tolerance=0.1)
    with pytest.raises(ConfigurationError, match="config is a float"):
        CompreSSMCallback(0.1)
    with pytest.raises(ConfigurationError, match="unknown setting"):
        CompreSSMCallback({"tolerence": 0.1})


def test_nothing_is_left_on_the_model_after_training(tmp_path) -> None:
    model = tiny_mamba()
    make_trainer(tmp_path, CompreSSMCallback(HALF), model, rows=Stream(Rows(token_batch(batch=64)))).train()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("asked", [True, False])
def test_the_fast_scan_is_on_in_training_and_off_afterwards_unless_asked_for(asked: bool, tmp_path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(fast_cpu_scan_enabled())

    with fast_cpu_scan(asked):
        trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), callbacks=[Watch()])
        trainer.train()
        assert all(seen) and fast_cpu_scan_enabled() is asked
        trainer.train()
        assert all(seen) and fast_cpu_scan_enabled() is asked
    assert not fast_cpu_scan_enabled()


def test_the_fast_scan_is_off_when_a_failed_training_is_let_go_of(tmp_path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("of the user's own")

    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), callbacks=[Fail()])
    with pytest.raises(RuntimeError, match="own"):
        trainer.train()
    del trainer
    gc.collect()
    assert not fast_cpu_scan_enabled()
