"""What the Trainer's evaluations say of a model before and after its cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...cards.provenance import Evaluation
from ...compression.history import CheckRecord, standing_cuts

# Metrics that say how fast an evaluation was, not how good the model is.
_NOT_A_QUALITY = ("runtime", "per_second", "epoch", "step", "num_input_tokens", "memory")


def evaluations(
    log_history: Sequence[dict[str, Any]], records: Sequence[CheckRecord], data: str, best: int | None = None
) -> tuple[Evaluation, ...]:
    """
    What the Trainer's own evaluations say about the cuts that stand.

    An evaluation in the step of a cut already sees the smaller model, as the Trainer evaluates after the cut.

    Args:
        log_history (`Sequence[dict]`): The Trainer's log history.
        records (`Sequence[CheckRecord]`): Every check.
        data (`str`): What was evaluated on, in words.
        best (`int`, *optional*): The step of the best checkpoint, where the run went back past a cut to it.

    Returns:
        `tuple[Evaluation, ...]`: One entry a metric of the latest evaluation; `before` is that of the last evaluation
        before the first cut, where there was one.
    """
    if not standing_cuts(records):
        return ()
    first = min(record.step for record in records if record.outcome == "cut" and record.step is not None)
    before = [entry for entry in _evaluated(log_history) if entry.get("step", 0) < first]
    after = _evaluated(log_history[_start_of_the_present_model(log_history, records) :])
    if not after and best is not None:
        after = [entry for entry in _evaluated(log_history) if entry.get("step") == best]
    if not after:
        return ()
    return tuple(
        Evaluation(
            name.removeprefix("eval_"),
            _number(before[-1].get(name)) if before else None,
            _number(value),
            data,
            before_step=before[-1].get("step") if before else None,
            after_step=after[-1].get("step"),
        )
        for name, value in after[-1].items()
        if name.startswith("eval_") and _number(value) is not None and not any(word in name for word in _NOT_A_QUALITY)
    )


def _evaluated(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log if any(name.startswith("eval_") for name in entry)]


def _start_of_the_present_model(log: Sequence[dict[str, Any]], records: Sequence[CheckRecord]) -> int:
    """The place in the log from which on evaluations are of the model as the last change of its sizes left it."""
    last = max(place for place, record in enumerate(records) if record.outcome in ("cut", "rolled_back"))
    checks = [place for place, entry in enumerate(log) if "compressm/cut" in entry]
    if len(checks) == len(records):
        return checks[last]
    step = records[last].step or 0
    return next((place for place, entry in enumerate(log) if entry.get("step", 0) >= step), len(log))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
