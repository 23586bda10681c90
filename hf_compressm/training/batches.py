"""Where a check gets its batches from, without disturbing the order or the randomness of the training data."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from ..compression.decide.progress import combined_seed
from ..compression.measure.model_pass import says_nothing
from ..config import CompreSSMConfig
from ..errors import ConfigurationError
from ..validation import require_batches

# Of torch, accelerate and transformers; each of them goes through the whole data set.
_COMPLETE_SAMPLERS = frozenset(
    {"RandomSampler", "SequentialSampler", "DistributedSampler", "SeedableRandomSampler", "LengthGroupedSampler"}
)


# A batch whose labels are all ignored is drawn anew; data without any other kind must come to an end.
_DRAWS = 20


class SampledBatches:
    """
    Draws batches from the training set by indices of its own.

    Args:
        dataloader (`torch.utils.data.DataLoader`): Its `dataset` (with a length and random access) and `collate_fn` are
            used; it is never iterated.
        batch_size (`int`): Examples in a batch.
        count (`int`): Batches that one check looks at.
        seed (`int`): Combined with the step, so that a resumed run draws what the uninterrupted one draws.
    """

    def __init__(self, dataloader: DataLoader, batch_size: int, count: int, seed: int) -> None:
        self._dataset = dataloader.dataset
        self._collate = dataloader.collate_fn
        self._batch_size, self._count, self._seed = batch_size, count, seed

    def arm(self, due: bool) -> None:
        """Nothing to do: the examples are there at any time."""

    def draw(self, step: int) -> list[Any]:
        """The batches for the check after a training step."""
        generator = torch.Generator().manual_seed(combined_seed(self._seed, step))
        size = min(self._batch_size, len(self._dataset))
        batches = []
        with unchanged_random_state():
            for _ in range(self._count):
                for _ in range(_DRAWS):
                    indices = torch.randint(len(self._dataset), (size,), generator=generator).tolist()
                    batch = self._collate([self._dataset[index] for index in indices])
                    if not says_nothing(batch):
                        break
                batches.append(batch)
        return batches

    def sample(self) -> Any:
        """One batch, to try the loss with."""
        with unchanged_random_state():
            return self._collate([self._dataset[index] for index in range(min(self._batch_size, len(self._dataset)))])

    def close(self) -> None:
        """Nothing to release."""


class CapturedBatches:
    """
    Keeps the inputs of the latest training forward passes, for data that can only be read once (a stream).

    Args:
        model (`torch.nn.Module`): The model whose inputs are kept.
        count (`int`): Batches to keep.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=count)
        self._armed = False
        self._names = list(inspect.signature(model.forward).parameters)
        self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._armed and module.training:
            # The Trainer divides by this number what several accumulated batches add up to.
            kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
            self._kept.append({**dict(zip(self._names, args)), **kwargs})

    def arm(self, due: bool) -> None:
        """Start keeping inputs when a check is due at the end of this step."""
        self._armed = due

    def draw(self, step: int) -> list[Any]:
        """The kept inputs, which are given up."""
        batches = list(self._kept)
        self._kept.clear()
        self._armed = False
        return [batch for batch in batches if not says_nothing(batch)] or batches

    def sample(self) -> None:
        """Nothing is known before the first step."""

    def close(self) -> None:
        """Stop watching the model."""
        self._handle.remove()
        self._kept.clear()


class GivenBatches:
    """
    Batches that the user gave.

    Args:
        batches (`Iterable`): Can be gone through more than once, as a list or a data loader can.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def arm(self, due: bool) -> None:
        """Nothing to do: the batches are there at any time."""

    def draw(self, step: int) -> list[Any]:
        """All batches."""
        with unchanged_random_state():
            return list(self._batches)

    def sample(self) -> Any:
        """One batch, to try the loss with; None where there is none."""
        with unchanged_random_state():
            return next(iter(self._batches), None)

    def close(self) -> None:
        """Nothing to release."""


def training_batches(
    model: nn.Module,
    dataloader: DataLoader,
    batch_size: int,
    count: int,
    seed: int,
    given: Iterable[Any] | None = None,
) -> SampledBatches | CapturedBatches | GivenBatches:
    """
    The source of a run's calibration batches: what the user gave, else sampled where possible, else captured.

    Batches are sampled from data with random access that the loader goes through as a whole; of a stream, or where a
    sampler of the user's own chooses, they are captured from the training steps.

    Args:
        model (`torch.nn.Module`): The model in training.
        dataloader (`torch.utils.data.DataLoader`): The loader of its training data.
        batch_size (`int`): Examples in a sampled batch.
        count (`int`): Batches that one check looks at.
        seed (`int`): Seed of sampled batches.
        given (`Iterable`, *optional*): Batches that the user gave.
    """
    if given is not None:
        return GivenBatches(given)
    dataset = getattr(dataloader, "dataset", None)
    readable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if readable and not isinstance(dataset, IterableDataset) and _draws_from_everything(dataloader):
        return SampledBatches(dataloader, batch_size, count, seed)
    return CapturedBatches(model, count)


def seed_of_process(args: TrainingArguments, config: CompreSSMConfig) -> int:
    """The seed of a process's calibration samples; each process looks at examples of its own."""
    return args.seed + config.seed + 7919 * args.process_index


def require_lasting_batches(name: str, batches: Any) -> Any:
    """
    Raise unless the value is unset or can be gone through again and again, batch by batch; returns it.

    Args:
        name (`str`): The argument.
        batches (`object`): Its value.

    Raises:
        [`~errors.ConfigurationError`]: it is a number, a single batch, or used up after one check.
    """
    if isinstance(require_batches(name, batches), Iterator):
        raise ConfigurationError(
            f"{name} is a {type(batches).__name__}, which is used up after one check; give list({name}), cut short "
            "where it has no end."
        )
    return batches


def _draws_from_everything(dataloader: DataLoader) -> bool:
    """Whether a loader makes batches of all examples; a sampler of the user's own may leave some out."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    if batch_sampler is None:
        return False
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None)
    return type(sampler).__name__ in _COMPLETE_SAMPLERS


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (CPU) back at the end; data transforms may use any of them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
