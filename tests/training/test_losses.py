"""The loss of a check is the Trainer's; what says nothing or is not reached costs no cut."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from hf_compressm.errors import ConfigurationError
from tests.cases import VOCABULARY, Case, case_id, tiny_lru, tiny_mamba, token_batch
from tests.selective_models import tiny_mamba2
from tests.training.test_callback import Rows, arguments, make_trainer

HALF = {"strategy": "fixed", "keep_ratio": 0.5}
AT_THREE = CompreSSMConfig(**HALF, window=(0, 3))

FAMILIES = [
    Case("lru", "lru", tiny_lru, token_batch),
    Case("mamba", "mamba", tiny_mamba, token_batch),
    Case("mamba2", "mamba2", tiny_mamba2, token_batch),
]
every_family = pytest.mark.parametrize("case", FAMILIES, ids=case_id)


def sizes(model: nn.Module) -> set[int]:
    return {layer.state_size for layer in find_layers(model)}


def outcomes(callback: CompreSSMCallback) -> list[tuple[str, int]]:
    return [(record.outcome, record.step) for record in callback.records]


class TokensAlone(nn.Module):
    """A language model that takes its tokens and nothing else, and returns its logits and no loss."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids):
        return self.body(input_ids=input_ids).logits


class Masked(Rows):
    """The tokens of a batch with a mask that the model does not take."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.batch["input_ids"][index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class OwnLoss(Trainer):
    """Makes the loss itself, weighted; may fail at some steps, in a check alone."""

    fails_at: tuple[int, ...] = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training and self.state.global_step in self.fails_at:
            raise KeyError("mine")
        tokens = inputs.pop("input_ids")
        return own_loss(model(tokens), tokens)


def own_loss(logits, tokens):
    weight = torch.linspace(1, 5, VOCABULARY)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), weight=weight)


def trained(kind, model, folder, rows=None, config=AT_THREE, fails_at=(), callbacks=(), steps=6, **settings):
    callback = CompreSSMCallback(config)
    given = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    args = arguments(folder, max_steps=steps, remove_unused_columns=False, **settings)
    rows = Rows(token_batch(batch=32)) if rows is None else rows
    trainer = kind(model=model, args=args, train_dataset=rows, callbacks=[callback, *callbacks], **given)
    trainer.fails_at = fails_at
    trainer.train()
    return trainer, callback


@every_family
def test_compute_loss_of_a_subclass_is_taken(case, tmp_path) -> None:
    """Cases 01 and 02: the model takes some of the batch's keys alone, and returns no loss."""
    trainer, callback = trained(OwnLoss, TokensAlone(case.build()), tmp_path, Masked(token_batch(batch=32)))
    assert outcomes(callback) == [("cut", 3)] and sizes(trainer.model) == {4}
    assert trainer.state.global_step == 6


class AtTheCheck(TrainerCallback):
    """Takes, with other means, the loss that the check after step 3 has to report."""

    def __init__(self, take) -> None:
        self.take, self.loss = take, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3 and self.loss is None:
            model.eval()
            with torch.no_grad():
                self.loss = float(self.take(model))
            model.train()


def reported_and_expected(folder, kind, model, take, **settings):
    batch = token_batch(batch=4, seed=9)
    expected = AtTheCheck(partial(take, batch=batch))
    callback = CompreSSMCallback(AT_THREE, calibration_batches=[batch])
    given = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    trainer = kind(
        model=model, args=arguments(folder, max_steps=6, **settings), train_dataset=Rows(token_batch(batch=32)),
        callbacks=[expected, callback], **given,
    )  # fmt: skip
    trainer.train()
    [record] = callback.records
    assert record.outcome == "cut"
    return record.loss_before, expected.loss


@every_family
def test_compute_loss_func_is_taken_with_its_number_of_items(case, tmp_path) -> None:
    def per_item(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return 3 * summed / num_items_in_batch

    def take(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        summed = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
        # The Trainer counts the labels that its model's loss predicts, or all of them, as the release has it.
        return torch.stack([3 * summed / 76, 3 * summed / 80]).mean()

    found, expected = reported_and_expected(tmp_path, Trainer, case.build(), take, compute_loss_func=per_item)
    assert found == pytest.approx(expected, rel=0.03)


# The Trainer shifts the labels for the causal models alone that transformers lists.
@pytest.mark.parametrize("case", FAMILIES[1:], ids=case_id)
def test_smoothed_labels_are_smoothed_in_a_check_too(case, tmp_path) -> None:
    def take(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.3)

    found, expected = reported_and_expected(tmp_path, Trainer, case.build(), take, label_smoothing_factor=0.3)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_failing_check_is_tried_again_at_the_next_step(tmp_path, caplog) -> None:
    with caplog.at_level(logging.ERROR, "hf_compressm"):
        trainer, callback = trained(OwnLoss, TokensAlone(tiny_mamba()), tmp_path, Masked(token_batch(batch=32)),
                                    fails_at=(3,))  # fmt: skip
    assert outcomes(callback) == [("skipped", 3), ("cut", 4)]
    assert "mine" in callback.records[0].reason
    assert 'raise KeyError("mine")' in caplog.text, "the traceback leads to the user's own line"


@pytest.mark.parametrize("steps", [6, 20])
def test_a_check_that_fails_to_the_end_is_not_dropped_in_silence(steps: int, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        trainer, callback = trained(OwnLoss, TokensAlone(tiny_mamba()), tmp_path, Masked(token_batch(batch=32)),
                                    fails_at=range(1, steps + 1), steps=steps)  # fmt: skip
    assert {outcome for outcome, _ in outcomes(callback)} == {"skipped"} and trainer.state.global_step == steps
    assert callback.records[-1].step == min(steps, 11)
    [told] = [record.getMessage() for record in caplog.records if "no further check" in record.getMessage()]
    assert "mine" in told and f"step {min(steps, 11)}" in told and "state sizes stay" in told


def test_a_later_check_of_the_schedule_is_still_to_come(tmp_path, caplog) -> None:
    config = CompreSSMConfig(**HALF, window=(0, 16), interval=3)
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        _, callback = trained(OwnLoss, TokensAlone(tiny_mamba()), tmp_path, Masked(token_batch(batch=32)),
                              config=config, fails_at=range(1, 12), steps=20)  # fmt: skip
    assert ("cut", 12) in outcomes(callback) and "no further check" not in caplog.text


def test_a_loss_that_cannot_be_taken_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="loss of a calibration batch"):
        trained(OwnLoss, TokensAlone(tiny_mamba()), tmp_path, Masked(token_batch(batch=32)), fails_at=(0,))
    with pytest.raises(ConfigurationError, match="TypeError.*attention_mask"):
        trained(Trainer, TokensAlone(tiny_mamba()), tmp_path, Masked(token_batch(batch=32)))


def masked(batch: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    labels = batch["labels"].clone()
    labels[rows] = -100
    return {**batch, "labels": labels}


@every_family
@pytest.mark.parametrize("rows", [slice(None), slice(0, 3)], ids=["a whole batch", "rows of it"])
def test_what_is_masked_out_costs_no_cut(case, rows) -> None:
    good, hidden = token_batch(seed=1), masked(token_batch(seed=2), rows)
    first, second = case.build(), case.build()
    assert compress(first, [good, hidden, good], CompreSSMConfig(**HALF)).outcome == "cut"
    if rows == slice(None):
        compress(second, [good, good], CompreSSMConfig(**HALF))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(one, other)


@every_family
def test_rows_that_are_masked_out_in_a_run_cost_no_cut(case, tmp_path) -> None:
    rows = Rows(masked(token_batch(batch=64), slice(0, 64, 2)))
    settings = {"per_device_train_batch_size": 1}
    trainer, callback = trained(Trainer, case.build(), tmp_path, rows, AT_THREE, **settings)
    assert sizes(trainer.model) == {4} and outcomes(callback) == [("cut", 3)]


class Teaching(nn.Module):
    """A student, a frozen teacher that runs without gradients, and a tower that never runs."""

    def __init__(self, build) -> None:
        super().__init__()
        self.student, self.teacher, self.idle = (build(seed=seed) for seed in range(3))
        self.teacher.requires_grad_(False)

    def forward(self, input_ids, labels=None):
        outputs = self.student(input_ids=input_ids, labels=labels)
        with torch.no_grad():
            target = self.teacher(input_ids=input_ids).logits.softmax(-1)
        distance = F.kl_div(outputs.logits.log_softmax(-1), target, reduction="batchmean") / input_ids.shape[1]
        return {"loss": outputs.loss + distance, "logits": outputs.logits}


@every_family
def test_a_frozen_teacher_and_an_idle_tower_keep_their_state_under_uniform(case, tmp_path, caplog) -> None:
    model = Teaching(case.build)
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        _, callback = trained(Trainer, model, tmp_path, Rows(token_batch(batch=32)))
    found = [sizes(part) for part in (model.student, model.teacher, model.idle)]
    assert found == [{4}, {8}, {8}] and outcomes(callback) == [("cut", 3)]
    assert "layers that keep their state: " in caplog.text and "idle." in caplog.text


class Checkpointed(nn.Module):
    """Wraps every call of its body in torch's activation checkpointing."""

    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant, self.scale = body, reentrant, nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels):
        def loss(scale):
            return scale * self.body(input_ids=input_ids, labels=labels).loss

        return (checkpoint(loss, self.scale, use_reentrant=self.reentrant),)


@every_family
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_the_users_own_backbone_hides_nothing(case, reentrant: bool) -> None:
    Checkpointed(case.build(), reentrant).train()(**case.batch())[0].backward()
    model, plain = Checkpointed(case.build(), reentrant).train(), case.build()
    found, expected = (analyze(each, [case.batch()]).sigma for each in (model, plain))
    for name, values in expected.items():
        torch.testing.assert_close(found[f"body.{name}"], values)
    assert compress(model, [case.batch()], CompreSSMConfig(**HALF)).outcome == "cut"
    compress(plain, [case.batch()], CompreSSMConfig(**HALF))
    torch.testing.assert_close(model.eval()(**case.batch())[0], plain.eval()(**case.batch()).loss)


class Two(nn.Module):
    """Two models beside each other."""

    def __init__(self, build) -> None:
        super().__init__()
        self.a, self.b = build(seed=0), build(seed=1)

    def forward(self, input_ids, labels=None):
        return (sum(part(input_ids=input_ids, labels=labels).loss for part in (self.a, self.b)),)


PATTERNS = [
    ({"exclude_layers": r"b\..*"}, (4, 8)),
    ({"target_layers": r"b\..*"}, (8, 4)),
    ({"target_layers": r".*", "exclude_layers": r"a\..*"}, (8, 4)),
]


@every_family
@pytest.mark.parametrize("settings, expected", PATTERNS, ids=str)
def test_patterns_choose_layers_in_a_run(case, settings, expected, tmp_path) -> None:
    model = Two(case.build)
    trained(Trainer, model, tmp_path, Rows(token_batch(batch=32)), CompreSSMConfig(**HALF, **settings, window=(0, 3)))
    assert (sizes(model.a), sizes(model.b)) == tuple({size} for size in expected)


def test_names_choose_layers_by_their_ends() -> None:
    model = Two(tiny_mamba2)
    config = CompreSSMConfig(**HALF, exclude_layers=["b.backbone.layers.0.mixer", "layers.1.mixer"])
    compress(model, [token_batch()], config)
    assert [layer.state_size for layer in find_layers(model)] == [4, 8, 8, 8]


@pytest.mark.parametrize("settings", [{"target_layers": ["nothing"]}, {"exclude_layers": r"c\..*"}])
def test_a_pattern_that_names_no_layer_is_refused_before_the_first_step(settings, tmp_path) -> None:
    config = CompreSSMConfig(**HALF, **settings, window=(0, 3))
    with pytest.raises(ConfigurationError, match="names no layer"):
        make_trainer(tmp_path, CompreSSMCallback(config)).train()


def test_a_pattern_that_leaves_no_layer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leave no layer to cut"):
        compress(tiny_mamba(), [token_batch()], CompreSSMConfig(**HALF, exclude_layers=".*"))


class BreaksLater(Rows):
    """Data that cannot be read for a while."""

    broken = False

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.broken:
            raise OSError("the disk is away")
        return super().__getitem__(index)


class Breaks(TrainerCallback):
    def __init__(self, rows: BreaksLater) -> None:
        self.rows = rows

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.rows.broken = state.global_step == 2

    def on_step_end(self, args, state, control, **kwargs):
        self.rows.broken = False


def test_data_that_cannot_be_read_in_a_check_ends_no_training(tmp_path) -> None:
    rows = BreaksLater(token_batch(batch=32))
    callback = CompreSSMCallback(AT_THREE)
    trainer = make_trainer(tmp_path, callback, rows=rows, callbacks=[Breaks(rows)], max_steps=6)
    trainer.train()
    assert outcomes(callback) == [("skipped", 3), ("cut", 4)] and "the disk is away" in callback.records[0].reason
