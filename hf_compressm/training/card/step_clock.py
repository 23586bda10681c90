"""How long training steps take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


class StepClock:
    """
    Measures what a training step takes before the first cut and after the last one, start-up steps left out.

    Args:
        now (`Callable`, *optional*): Gives the time in seconds.
    """

    _WARM_UP = 3

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last: float | None = None
        self._cuts: int | None = None
        self._seconds: dict[int, list[float]] = {}

    def tick(self, cuts: int) -> None:
        """A step begins, after so many cuts."""
        now = self._now()
        # The interval in which a cut happened belongs to neither side.
        if self._last is not None and cuts == self._cuts:
            self._seconds.setdefault(cuts, []).append(now - self._last)
        self._last, self._cuts = now, cuts

    def pause(self) -> None:
        """Something else than training happens until the next step begins."""
        self._last = None

    def before_and_after(self) -> tuple[float, float] | None:
        """Median seconds of a step before the first cut and after the last; None where one side was not seen."""
        if not self._cuts:
            return None
        before, after = (self._seconds.get(cuts, [])[self._WARM_UP :] for cuts in (0, self._cuts))
        return (statistics.median(before), statistics.median(after)) if before and after else None
