"""One check that never ends a training: what could not be completed is recorded as skipped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..compression import CheckRecord, Compressor
from ..errors import CalibrationError, NotFiniteError, TruncationError, UnstableSystemError

logger = logging.getLogger(__name__)


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
        compressor.check(batches, step=step, number=steps.index(step) + 1, total=len(steps))
    except (CalibrationError, NotFiniteError, TruncationError, UnstableSystemError) as error:
        compressor.skip(str(error), step=step)
        logger.warning("the check after step %d was skipped: %s", step, error)
    return compressor.records[known:]
