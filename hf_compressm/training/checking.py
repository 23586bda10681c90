"""One check that never ends a training: what could not be completed is recorded as skipped."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ..compression import CheckRecord, Compressor
from ..errors import CalibrationError, DisagreementError, NotFiniteError, TruncationError, UnstableSystemError

logger = logging.getLogger(__name__)

# A lack of usable data passes in a few steps or never.
_TRIES = 8


def check_or_skip(compressor: Compressor, batches: Sequence[Any], step: int, steps: Sequence[int]) -> list[CheckRecord]:
    """
    Check, and cut where the spectra allow it; a check that fails changes nothing and leaves a record that says why.

    Args:
        compressor ([`~compression.Compressor`]): Of the model in training.
        batches (`Sequence`): What to calibrate on.
        step (`int`): The training step.
        steps (`Sequence[int]`): The steps of all checks of the run.

    Returns:
        `list[CheckRecord]`: The new records; two where a cut was taken back at once.
    """
    known = len(compressor.records)
    try:
        compressor.check(batches, step=step, number=max(1, bisect_right(steps, step)), total=len(steps))
    except DisagreementError:
        raise
    except (CalibrationError, NotFiniteError, TruncationError, UnstableSystemError) as error:
        compressor.skip(str(error), step=step)
        logger.warning("the check after step %d was skipped: %s", step, error)
    except Exception as error:
        # Of the user's model, loss or data; the training can go on without this check.
        compressor.skip(f"{type(error).__name__}: {error}", step=step)
        logger.exception("the check after step %d was skipped, and the training goes on", step)
    return compressor.records[known:]


def makes_up(records: Sequence[CheckRecord], steps: Sequence[int], step: int) -> bool:
    """
    Whether a check is made after this step in the place of a skipped one, which is tried again at each of a few steps.

    Args:
        records (`Sequence[CheckRecord]`): Everything that happened before.
        steps (`Sequence[int]`): The steps of all checks of the run.
        step (`int`): The training step.
    """
    skipped = bool(records) and records[-1].outcome == "skipped" and records[-1].step == step - 1
    due = bisect_right(steps, step)
    return skipped and due > 0 and step - steps[due - 1] <= _TRIES
