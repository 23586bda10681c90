"""What users get wrong: refused before anything changes, or survived; never silently wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression import CheckRecord
from hf_compressm.errors import CalibrationError, ConfigurationError, UnsupportedModelError
from hf_compressm.training.batches import CapturedBatches, training_batches
from hf_compressm.training.resume import follow_checkpoints
from tests.cases import TRAINED_CASES, case_id, logits_of, tiny_lru, tiny_mamba, token_batch
from tests.training.test_callback import HALF, Rows, Stream, make_trainer
from tests.training.test_resume import SAVES, TWO_CUTS, StopAt
from tests.training.test_rollback import EVALUATED, judged

FIXED = CompreSSMConfig(strategy="fixed")


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
def test_a_refused_load_leaves_the_weights_whole(case) -> None:
    model, batch = case.build(), case.batch()
    follow_checkpoints(model)
    before = logits_of(model, batch)
    small = {
        name: value[..., :1] if value.ndim else value for name, value in case.build(state_size=4).state_dict().items()
    }
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(small)
    # torch itself has loaded what did fit; nothing may be left without values.
    assert torch.isfinite(logits_of(model, batch)).all() and before.isfinite().all()
    assert {layer.state_size for layer in find_layers(model)} == {8}


def test_a_load_that_brings_only_a_part_of_a_smaller_state_shows_at_once() -> None:
    model = tiny_mamba()
    follow_checkpoints(model)
    part = {name: value for name, value in tiny_mamba(4).state_dict().items() if name.endswith("A_log")}
    model.load_state_dict(part, strict=False)
    assert model.backbone.layers[0].mixer.x_proj.weight.isnan().all()


def test_an_optimizer_of_a_part_of_the_parameters_is_refused() -> None:
    model = tiny_mamba()
    part = torch.optim.AdamW([p for name, p in model.named_parameters() if "A_log" in name])
    with pytest.raises(UnsupportedModelError, match="2 of the 4 parameters that would be cut are not in AdamW"):
        compress(model, [token_batch()], FIXED, part)
    assert model.config.state_size == 8
    with pytest.raises(UnsupportedModelError):  # known before any batch is run
        compress(model, [{"input_ids": "no batch"}], FIXED, part)
    for layer in model.backbone.layers:
        layer.mixer.x_proj.requires_grad_(False)
    assert compress(model, [token_batch()], FIXED, part).outcome == "cut", "frozen parameters need no optimizer"


def test_such_an_optimizer_is_refused_before_the_first_step(tmp_path) -> None:
    model = tiny_mamba()
    optimizer = torch.optim.AdamW([model.backbone.norm_f.weight])
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF), model)
    trainer.optimizer = optimizer
    with pytest.raises(UnsupportedModelError, match="4 of the 4 parameters"):
        trainer.train()


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.LBFGS])
def test_what_is_no_optimizer_or_one_that_cannot_follow(optimizer) -> None:
    model = tiny_mamba()
    made = optimizer if isinstance(optimizer, str) else optimizer(model.parameters())
    with pytest.raises(UnsupportedModelError, match="LBFGS|without parameter groups"):
        compress(model, [token_batch()], FIXED, made)
    assert model.config.state_size == 8


def test_the_inner_optimizer_of_a_sharpness_aware_one_is_found() -> None:
    class SharpnessAware:
        def __init__(self, inner) -> None:
            self.base_optimizer, self.param_groups = inner, inner.param_groups

    model = tiny_mamba()
    inner = torch.optim.AdamW(model.parameters())
    model(**token_batch()).loss.backward()
    inner.step()
    compress(model, [token_batch()], FIXED, SharpnessAware(inner))
    weight = model.backbone.layers[0].mixer.x_proj.weight
    assert inner.state[weight]["exp_avg"].shape == weight.shape


def test_arguments_that_a_restored_callback_would_lose_are_not_lost_silently(tmp_path) -> None:
    def loss(model, batch):
        return model(**batch).loss

    settings = {**SAVES, "restore_callback_states_from_checkpoint": True}
    callback = CompreSSMCallback(TWO_CUTS, loss_function=loss)
    make_trainer(tmp_path, callback, callbacks=[StopAt(3)], **settings).train()
    with pytest.raises(ConfigurationError, match="without its loss_function"):
        make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS, loss_function=loss), **settings).train(
            resume_from_checkpoint=True
        )


def test_the_loss_of_captured_batches_is_not_divided_by_the_accumulation(tmp_path) -> None:
    losses = []
    for steps in (1, 4):
        callback = CompreSSMCallback(HALF)
        rows = Stream(Rows(token_batch(batch=64)))
        make_trainer(tmp_path, callback, rows=rows, gradient_accumulation_steps=steps, learning_rate=1e-6).train()
        losses.append(callback.records[0].loss_before)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_an_evaluation_that_is_not_a_number_is_worse(tmp_path) -> None:
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            metrics["eval_score"] = math.nan if model.config.state_size < 8 else 1.0

    callback = CompreSSMCallback(judged())
    make_trainer(tmp_path, None, callbacks=[Judge(), callback], **EVALUATED).train()
    assert [record.outcome for record in callback.records] == ["cut", "rolled_back"]


def test_two_models_in_one_keep_their_own_configs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = tiny_mamba(4), tiny_mamba(16)

        def forward(self, **batch):
            return (self.a(**batch).loss + self.b(**batch).loss,)

    model = Pair()
    compress(model, [token_batch()], FIXED)
    for part in (model.a, model.b):
        assert {layer.state_size for layer in find_layers(part)} == {part.config.state_size}


@pytest.mark.parametrize(
    "build, batches, settings, error",
    [
        (tiny_mamba, [{"input_ids": token_batch()["input_ids"]}], {"gramians": "white_noise"}, CalibrationError),
        (tiny_lru, None, {}, CalibrationError),
        (tiny_mamba, [token_batch()], {"rollback_metric": "eval_loss"}, ConfigurationError),
    ],
)
def test_a_rollback_that_nothing_could_ask_for_is_refused(build, batches, settings, error) -> None:
    model = build()
    with pytest.raises(error, match="rollback_"):
        compress(model, batches, CompreSSMConfig(strategy="fixed", rollback_tolerance=0.0, **settings))
    assert model.config.state_size == 8


def test_settings_of_a_rollback_without_a_tolerance_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="without a rollback_tolerance no cut is taken back"):
        CompreSSMConfig(rollback_metric="eval_accuracy")


def test_a_training_that_ends_before_the_judgement_says_so(tmp_path, caplog) -> None:
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = 1.0

    config = judged(window=(0, 4), interval=None, rollback_after=5)
    make_trainer(tmp_path, None, callbacks=[Judge(), CompreSSMCallback(config), StopAt(6)], **EVALUATED).train()
    assert "ended before the latest cut was judged" in caplog.text


def test_hooks_on_a_parameter_that_would_be_cut_are_not_lost_silently() -> None:
    model = tiny_mamba()
    handle = model.backbone.layers[0].mixer.x_proj.weight.register_hook(lambda grad: grad)
    with pytest.raises(UnsupportedModelError, match="has hooks on its gradient"):
        compress(model, [token_batch()], FIXED)
    handle.remove()
    assert compress(model, [token_batch()], FIXED).outcome == "cut"


def test_a_single_average_is_meant_as_a_list_of_one(tmp_path) -> None:
    model = tiny_mamba()
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_trainer(tmp_path, CompreSSMCallback(HALF, averaged_weights=average), model).train()
    assert average["backbone.layers.0.mixer.A_log"].shape == (32, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"calibration_batches": 4}, "calibration_batches is a int"),
        ({"calibration_batches": token_batch()}, "calibration_batches is a dict"),
        ({"calibration_batches": iter([token_batch()])}, "used up after one check"),
        ({"loss_function": "ce"}, "loss_function is 'ce'"),
    ],
)
def test_arguments_of_another_kind_are_refused_when_the_callback_is_made(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CompreSSMCallback(**arguments)


@pytest.mark.parametrize("loss", [lambda model, batch: 1.0, lambda model, batch: model(**batch).logits])
def test_a_loss_function_that_gives_no_number_is_told_so(loss) -> None:
    with pytest.raises(CalibrationError, match="must return a tensor with a single number"):
        compress(tiny_mamba(), [token_batch()], FIXED, loss_function=loss)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_a_context_without_gradients(context) -> None:
    model = tiny_mamba()
    with context():
        spectrum = analyze(model, [token_batch()]) if context is torch.no_grad else None
        record = compress(model, [token_batch()], FIXED)
    assert record.outcome == "cut" and (spectrum is None or len(spectrum.sigma) == 2)
    model(**token_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.layers[0].mixer.parameters())


@pytest.mark.parametrize("way", ["module", "wrapper"])
def test_a_compiled_model_is_cut(way: str) -> None:
    model = tiny_mamba()
    if way == "module":
        model.compile(backend="eager")
    given = model if way == "module" else torch.compile(model, backend="eager")
    assert compress(given, [token_batch()], FIXED).outcome == "cut"
    assert model.config.state_size == 4


def test_examples_that_a_sampler_leaves_out_are_not_calibrated_on() -> None:
    rows = Rows(token_batch(batch=16))
    model = tiny_mamba()
    chosen = DataLoader(rows, batch_size=2, sampler=SubsetRandomSampler(range(8)))
    ready = DataLoader([token_batch(batch=2)] * 4, batch_size=None)
    for loader in (chosen, ready):
        source = training_batches(model, loader, 2, 1, seed=0)
        assert isinstance(source, CapturedBatches)
        source.close()
    assert not isinstance(
        training_batches(model, DataLoader(rows, batch_size=2, shuffle=True), 2, 1, 0), CapturedBatches
    )


def test_a_history_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog, monkeypatch) -> None:
    from hf_compressm.training import run as run_module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "write_history", full)
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF))
    trainer.train()
    assert trainer.model.config.state_size == 4 and "No space left on device" in caplog.text


def test_the_history_of_an_earlier_run_is_kept(tmp_path) -> None:
    trainer = make_trainer(tmp_path, CompreSSMCallback(HALF))
    trainer.train()
    trainer.train()
    first = json.loads((tmp_path / "compressm_history.1.json").read_text())
    second = json.loads((tmp_path / "compressm_history.json").read_text())
    sizes = [content["checks"][0]["layers"][0]["size_after"] for content in (first, second)]
    assert sizes == [4, 2]


def test_two_callbacks_in_one_trainer_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="two CompreSSMCallbacks"):
        make_trainer(tmp_path, CompreSSMCallback(HALF), callbacks=[CompreSSMCallback(HALF)]).train()


def test_a_record_of_a_later_version_is_read() -> None:
    record = CheckRecord("kept", "why").to_dict()
    assert CheckRecord.from_dict({**record, "a_later_field": 1}) == CheckRecord("kept", "why")


def test_settings_as_a_dictionary_and_numbers_beyond_a_float() -> None:
    assert compress(tiny_mamba(), [token_batch()], {"strategy": "fixed"}).outcome == "cut"
    with pytest.raises(ConfigurationError, match="config is a float"):
        compress(tiny_mamba(), [token_batch()], 0.1)
    with pytest.raises(ConfigurationError, match="tolerance is 1000"):
        CompreSSMConfig(tolerance=10**400)


def test_a_quantised_moment_is_reset_with_a_warning(caplog) -> None:
    class Quantised(torch.Tensor):
        """A tensor of which few operations are known."""

    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**token_batch()).loss.backward()
    optimizer.step()
    weight = model.backbone.layers[0].mixer.x_proj.weight
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].as_subclass(Quantised)
    compress(model, [token_batch()], FIXED, optimizer)
    assert optimizer.state[model.backbone.layers[0].mixer.x_proj.weight] == {} and "is reset" in caplog.text
