"""Metrics of the `evaluate` library that are computed here: no script is fetched, so they work without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = ""


class ClassAccuracy(evaluate.Metric):
    """Share of the predicted classes that are the true ones: `compute(predictions=..., references=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class BitsPerByte(evaluate.Metric):
    """
    Information that a model needs for one byte of text.

    `compute(predictions=..., references=...)` takes one entry a text: the summed negative log-likelihood in nats, and
    the number of bytes that it covers. Texts of different lengths weigh by their bytes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        nats, size = float(np.sum(predictions)), int(np.sum(references))
        if size <= 0:
            raise ValueError(f"the texts have {size} bytes in all; bits per byte need at least one.")
        return {"bits_per_byte": nats / math.log(2) / size}


def classification_metrics() -> Callable[[Any], dict[str, float]]:
    """The accuracy, in the form that `Trainer(compute_metrics=...)` takes."""
    # In memory, because several runs at once would share one cache file.
    metric = ClassAccuracy(keep_in_memory=True)

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids)

    return compute
