"""Draws odd inputs from a seed and counts what they did."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import calls, checkpoints, commands, files, settings, trainings
from .judge import BrokenRule, Case, judged

AREAS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "settings": settings.cases,
    "analyze and compress": calls.cases,
    "callback": trainings.cases,
    "checkpoints": checkpoints.cases,
    "command line": commands.cases,
    "files": files.cases,
}


@dataclass
class Tried:
    """
    What the inputs of an area did.

    Args:
        outcomes (`dict[str, Counter]`): By kind of input, how many worked or were refused by which error.
        broken (`list[str]`): Those that did neither.
        seconds (`float`): How long it took.
    """

    outcomes: dict[str, Counter] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """How many inputs were tried."""
        return len(self.broken) + sum(sum(counter.values()) for counter in self.outcomes.values())


def tried(area: str, count: int, seed: int) -> Tried:
    """
    Try the first inputs that a seed gives in an area.

    Args:
        area (`str`): One of `AREAS`.
        count (`int`): How many.
        seed (`int`): The seed.
    """
    result, start = Tried(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = AREAS[area](random.Random(f"{area} {seed}"), Path(folder))
        for number in range(count):
            torch.manual_seed(number)
            case = next(found)
            try:
                result.outcomes.setdefault(case.kind, Counter())[judged(case)] += 1
            except BrokenRule as rule:
                result.broken.append(f"{area}, seed {seed}, number {number}: {rule}")
    result.seconds = time.perf_counter() - start
    return result
