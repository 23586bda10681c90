"""Metrics against their definitions, without a network."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiments.metrics import BitsPerByte, ClassAccuracy, classification_metrics
from sklearn.metrics import accuracy_score


def test_accuracy_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 3, (2, 200))
    found = ClassAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found["accuracy"] == pytest.approx(accuracy_score(references, predictions))


def test_accuracy_in_parts_is_accuracy_at_once() -> None:
    metric = ClassAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 2, 3], references=[1, 2, 0])
    metric.add_batch(predictions=[5], references=[0])
    assert metric.compute()["accuracy"] == 0.5


def test_the_form_that_the_trainer_takes() -> None:
    prediction = SimpleNamespace(predictions=np.array([[0.1, 0.9], [2.0, -1.0]]), label_ids=np.array([1, 1]))
    assert classification_metrics()(prediction) == {"accuracy": 0.5}
    nested = SimpleNamespace(predictions=(prediction.predictions, None), label_ids=prediction.label_ids)
    assert classification_metrics()(nested) == {"accuracy": 0.5}


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte() -> None:
    logits = torch.zeros(10, 256)
    nats = torch.nn.functional.cross_entropy(logits, torch.arange(10), reduction="sum").item()
    found = BitsPerByte(keep_in_memory=True).compute(predictions=[nats, 0.0], references=[10, 0])
    assert found["bits_per_byte"] == pytest.approx(8)


def test_texts_weigh_by_their_bytes() -> None:
    found = BitsPerByte(keep_in_memory=True).compute(predictions=[3 * math.log(2), 1 * math.log(2)], references=[1, 3])
    assert found["bits_per_byte"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one"):
        BitsPerByte(keep_in_memory=True).compute(predictions=[1.0], references=[0])
