"""What all classifiers share: inputs, padding, pooling, pairs, saving, training."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from tests.models.tiny import CLASSIFIERS, SIZES, Tiny, name_of, reading, sequences

each_classifier = pytest.mark.parametrize("tiny", CLASSIFIERS, ids=name_of)
each_kind = pytest.mark.parametrize("kind", ["input_ids", "input_values"])
LENGTH = 20


def shifted(inputs: dict, amount: int) -> dict:
    """The same inputs with other content in front (a positive amount) or behind (a negative amount), and the mask."""
    (kind, values), axis = next(iter(inputs.items())), -1 if "input_ids" in inputs else -2
    other = values.narrow(axis, 0, abs(amount)).flip(axis)
    other = 5 * other if kind == "input_values" else other
    ones, zeros = torch.ones(values.shape[: values.ndim + axis + 1]), torch.zeros(*values.shape[:axis], abs(amount))
    parts = ((other, zeros), (values, ones)) if amount > 0 else ((values, ones), (other, zeros))
    return {kind: torch.cat([p[0] for p in parts], axis), "attention_mask": torch.cat([p[1] for p in parts], -1)}


@each_classifier
@each_kind
@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@torch.no_grad()
def test_padding_does_not_change_the_logits(tiny: Tiny, kind: str, paired: bool, pooling: str) -> None:
    model = tiny.build(**reading(kind), paired_inputs=paired, pooling=pooling)
    inputs = sequences(kind, *((4, 2) if paired else (4,)), LENGTH)
    logits = model(**inputs).logits
    assert logits.shape == (4, SIZES["num_labels"])
    for amount in (3, -3):
        torch.testing.assert_close(model(**shifted(inputs, amount)).logits, logits, atol=1e-5, rtol=1e-5)
    # The test can fail: without the mask, padding counts.
    unmasked = shifted(inputs, -3) | {"attention_mask": None}
    assert not torch.allclose(model(**unmasked).logits, logits, atol=1e-4)


@each_classifier
@torch.no_grad()
def test_poolings_differ_and_are_what_they_say(tiny: Tiny) -> None:
    model = tiny.build()
    inputs = sequences("input_ids", 4, LENGTH)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    for pooling, pooled in (("mean", hidden.mean(1)), ("last", hidden[:, -1]), ("max", hidden.max(1).values)):
        model.config.pooling = pooling
        torch.testing.assert_close(model(**inputs).logits, model.head(pooled))


@each_classifier
@torch.no_grad()
def test_each_sequence_of_a_pair_counts_and_so_does_their_order(tiny: Tiny) -> None:
    model = tiny.build(paired_inputs=True)
    inputs = sequences("input_ids", 4, 2, LENGTH)["input_ids"]
    logits = model(inputs).logits
    assert not torch.allclose(model(inputs.flip(1)).logits, logits, atol=1e-4)
    for changed in (0, 1):
        other = inputs.clone()
        other[:, changed] = (other[:, changed] + 1) % 11
        assert not torch.allclose(model(other).logits, logits, atol=1e-4)


@each_classifier
@each_kind
@torch.no_grad()
def test_a_saved_model_loads_with_the_auto_class(tiny: Tiny, kind: str, tmp_path) -> None:
    model = tiny.build(**reading(kind))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    inputs = sequences(kind, 4, LENGTH)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    found, expected = (config.to_diff_dict() for config in (AutoConfig.from_pretrained(tmp_path), model.config))
    assert {key: found.get(key) for key in expected if key != "_name_or_path"} == expected


@each_classifier
def test_loss_is_the_mean_cross_entropy_and_tuples_hold_the_same(tiny: Tiny) -> None:
    model = tiny.build()
    inputs, labels = sequences("input_ids", 4, LENGTH), torch.tensor([0, 1, 2, 0])
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    loss, logits = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


@each_classifier
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_gradient_checkpointing_changes_nothing(tiny: Tiny, use_reentrant: bool) -> None:
    inputs, labels = sequences("input_ids", 4, LENGTH), torch.tensor([0, 1, 2, 0])
    found = []
    for checkpointing in (False, True):
        model = tiny.build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(**inputs, labels=labels).loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((gradients, dict(model.named_buffers())))
    torch.testing.assert_close(found[1], found[0])
    assert all(gradient is not None for gradient in found[0][0].values())


@each_classifier
@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, {}, "Give exactly one"),
        ({}, {**sequences("input_ids", 2, 5), **sequences("input_values", 2, 5)}, "Give exactly one"),
        ({}, sequences("input_values", 2, 5), "reads `input_ids`"),
        ({"input_size": 2}, sequences("input_ids", 2, 5), "reads `input_values`"),
        ({"input_size": 3}, sequences("input_values", 2, 5), "last axis"),
        ({"paired_inputs": True}, sequences("input_ids", 2, 5), "two sequences"),
        ({}, {**sequences("input_ids", 2, 5), "attention_mask": torch.ones(2, 4)}, r"must be \(2, 5\)"),
    ],
)
def test_wrong_inputs_are_named(tiny: Tiny, settings: dict, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.build(**settings)(**inputs)


@each_classifier
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_size": 10**9}, "`state_size` is 1000000000"),
        ({"state_size": 0}, "`state_size` is 0"),
        ({"pooling": "median"}, "'mean', 'last', 'max'"),
        ({"dropout": 1.0}, "`dropout` is 1.0"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
        ({"vocab_size": None}, "neither `vocab_size` nor `input_size`"),
    ],
)
def test_impossible_settings_are_refused(tiny: Tiny, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.build(**settings)


@each_classifier
def test_the_trainer_trains_it(tiny: Tiny, tmp_path) -> None:
    model = tiny.build(input_size=1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64,), generator=generator)
    values = torch.randn(64, 12, 1, generator=generator) + 2.0 * (signs[:, None, None] * 2 - 1)
    data = [{"input_values": value, "labels": int(sign)} for value, sign in zip(values, signs)]
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "report_to": "none"}
    arguments = TrainingArguments(tmp_path, save_strategy="no", logging_strategy="no", use_cpu=True, **settings)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


@each_classifier
def test_accumulated_gradients_are_those_of_the_whole_batch(tiny: Tiny, tmp_path) -> None:
    inputs, labels = sequences("input_ids", 8, 6)["input_ids"], torch.arange(8) % 3
    data = [{"input_ids": row, "labels": int(label)} for row, label in zip(inputs, labels)]
    weights = []
    for per_step, accumulate in ((8, 1), (2, 4)):
        # Batch statistics differ between a batch and its parts, so they are frozen for this comparison.
        model = tiny.build(dropout=0.0, **({"norm": "layer"} if tiny.name in ("lru", "s4d") else {}))
        arguments = TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=per_step,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)
