"""What work takes: `Cost`, and the `Stopwatch` that measures it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """
    What a piece of work took.

    Args:
        seconds (`float`, *optional*, defaults to 0.0): By the clock on the wall.
        cpu_seconds (`float`, *optional*, defaults to 0.0): Of this process on all its cores; where other programs share
            the machine it is the fairer figure for work that is done on the CPU.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


class Stopwatch:
    """Measures the body of a `with` statement; repeated use adds up in `cost`."""

    def __init__(self) -> None:
        self.cost = Cost()

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: Any) -> None:
        wall, cpu = self._start
        self.cost += Cost(time.perf_counter() - wall, time.process_time() - cpu)
