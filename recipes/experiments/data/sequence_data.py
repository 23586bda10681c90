"""`SequenceData`: two data sets and what a model has to know of them; `SequenceCollator`: rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

PAD = 0


@dataclass(frozen=True)
class SequenceCollator:
    """
    Turns rows into a batch of a classifier.

    Rows hold `labels` and either `values`, bytes that become `input_values` (batch x time x features, float32,
    standardised), or `tokens`, padded at the end with 0 to the longest of the batch, which become `input_ids` and
    `attention_mask` (batch x time). Rows with `tokens` and `second_tokens` give both as batch x 2 x time.

    Args:
        mean (`tuple[float, ...]`, *optional*): Mean of each feature of `values`.
        deviation (`tuple[float, ...]`, *optional*): Standard deviation of each feature.
    """

    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.tensor([int(row["labels"]) for row in rows])
        if "values" in rows[0]:
            return {"input_values": self._standardised(rows), "labels": labels}
        names = ["tokens", "second_tokens"] if "second_tokens" in rows[0] else ["tokens"]
        input_ids, mask = _padded([[row[name] for name in names] for row in rows])
        if len(names) == 1:
            input_ids, mask = input_ids[:, 0], mask[:, 0]
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _standardised(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        values = torch.from_numpy(np.stack([np.asarray(row["values"], dtype=np.float32) for row in rows]))
        values = values.reshape(len(rows), -1, len(self.mean))
        return (values - torch.tensor(self.mean)) / torch.tensor(self.deviation)


def _padded(sequences: list[list[Any]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask of shape `(batch, sequences of a row, time)`."""
    longest = max(len(tokens) for row in sequences for tokens in row)
    input_ids = torch.full((len(sequences), len(sequences[0]), max(longest, 1)), PAD, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(sequences):
        for place, tokens in enumerate(row):
            input_ids[index, place, : len(tokens)] = torch.from_numpy(np.array(tokens, dtype=np.int64))
            mask[index, place, : len(tokens)] = 1
    return input_ids, mask


@dataclass(frozen=True)
class SequenceData:
    """
    A classification task on sequences.

    Args:
        train (`datasets.Dataset`): Rows as [`SequenceCollator`] takes them.
        test (`datasets.Dataset`): The same.
        num_labels (`int`): Classes.
        collator ([`SequenceCollator`]): Makes batches.
        input_size (`int`, *optional*): Features of a time step, for real-valued sequences.
        vocab_size (`int`, *optional*): Number of tokens with the padding, for sequences of tokens.
        paired (`bool`, *optional*, defaults to `False`): Whether a row holds two sequences.
    """

    train: Dataset
    test: Dataset
    num_labels: int
    collator: SequenceCollator
    input_size: int | None = None
    vocab_size: int | None = None
    paired: bool = False

    def model_settings(self) -> dict[str, Any]:
        """What a model's config has to know."""
        return {
            "num_labels": self.num_labels,
            "input_size": self.input_size,
            "vocab_size": self.vocab_size,
            "paired_inputs": self.paired,
        }


def first_examples(dataset: Dataset, count: int | None, seed: int = 0) -> Dataset:
    """`count` examples in an order that depends on the seed alone, or all of them in their own order."""
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))
