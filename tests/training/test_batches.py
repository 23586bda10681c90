"""Calibration batches: where they come from, and what drawing them leaves alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_compressm.training.batches import (
    CapturedBatches,
    GivenBatches,
    SampledBatches,
    training_batches,
    unchanged_random_state,
)


class Noisy(Dataset):
    """Draws from every global random source, as data augmentation does."""

    def __init__(self, length: int = 100) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"x": torch.tensor(float(index)), "noise": torch.rand(()) + random.random() + np.random.rand()}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"x": torch.tensor(float(i))} for i in range(10))


class Model(nn.Module):
    def forward(self, x, scale=1.0, **kwargs):
        return x * scale


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_map_style_set_is_sampled_without_a_trace() -> None:
    loader = DataLoader(Noisy(), batch_size=3)
    source = training_batches(Model(), loader, batch_size=8, count=2, seed=5)
    assert isinstance(source, SampledBatches)
    before = random_states()
    first, again, other = source.draw(10), source.draw(10), source.draw(11)
    assert random_states() == before
    assert len(first) == 2 and first[0]["x"].shape == (8,)
    assert torch.equal(first[0]["x"], again[0]["x"]) and not torch.equal(first[0]["x"], other[0]["x"])
    assert not torch.equal(first[0]["x"], first[1]["x"])


def test_a_set_smaller_than_a_batch_gives_smaller_batches() -> None:
    source = SampledBatches(DataLoader(Noisy(3)), batch_size=8, count=1, seed=0)
    assert source.draw(1)[0]["x"].shape == (3,)


def test_a_stream_is_captured_only_when_armed_and_only_in_training() -> None:
    model = Model()
    source = training_batches(model, DataLoader(Stream()), batch_size=2, count=2, seed=0)
    assert isinstance(source, CapturedBatches)
    model(torch.tensor(0.0))
    source.arm(True)
    for value in (1.0, 2.0, 3.0):
        model(torch.tensor(value), scale=2.0, labels=value)
    model.eval()
    model(torch.tensor(9.0))
    batches = source.draw(5)
    assert [float(batch["x"]) for batch in batches] == [2.0, 3.0]
    assert batches[0]["labels"] == 2.0 and batches[0]["scale"] == 2.0
    assert source.draw(6) == [], "batches are given once"
    source.close()
    assert not model._forward_pre_hooks


def test_given_batches_are_given_again() -> None:
    source = GivenBatches(DataLoader(Noisy(4), batch_size=2, shuffle=True))
    before = random_states()
    assert len(source.draw(1)) == len(source.draw(2)) == 2
    assert random_states() == before


def test_the_random_state_returns_after_an_error() -> None:
    before = random_states()
    with pytest.raises(RuntimeError), unchanged_random_state():
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError
    assert random_states() == before
