"""What the Trainer's evaluations say of a model before and after its cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...cards.provenance import Evaluation
from ...compression.history import CheckRecord

# Metrics that say how fast an evaluation was, not how good the model is.
_NOT_A_QUALITY = ("runtime", "per_second", "epoch", "step", "num_input_tokens", "memory")


def evaluations(
    log_history: Sequence[dict[str, Any]], records: Sequence[CheckRecord], data: str
) -> tuple[Evaluation, ...]:
    """
    What the Trainer's own evaluations say about the cuts.

    An evaluation in the step of a cut already sees the smaller model, as the Trainer evaluates after the cut.

    Args:
        log_history (`Sequence[dict]`): The Trainer's log history.
        records (`Sequence[CheckRecord]`): Every check.
        data (`str`): What was evaluated on, in words.

    Returns:
        `tuple[Evaluation, ...]`: One entry a metric of the latest evaluation; `before` is that of the last evaluation
        before the first cut, where there was one.
    """
    cuts = [record.step for record in records if record.outcome == "cut" and record.step is not None]
    if not cuts:
        return ()
    evaluated = [entry for entry in log_history if any(name.startswith("eval_") for name in entry)]
    before = [entry for entry in evaluated if entry.get("step", 0) < min(cuts)]
    after = [entry for entry in evaluated if entry.get("step", 0) >= max(cuts)]
    if not after:
        return ()
    return tuple(
        Evaluation(name.removeprefix("eval_"), _number(before[-1].get(name)) if before else None, _number(value), data)
        for name, value in after[-1].items()
        if name.startswith("eval_") and _number(value) is not None and not any(word in name for word in _NOT_A_QUALITY)
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
