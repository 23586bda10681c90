"""What a run's records say after `load_best_model_at_end`, which may go back past a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..compression import CheckRecord, LayerRecord, standing_cuts


def records_of_best(records: Sequence[CheckRecord], best: int, step: int) -> list[CheckRecord]:
    """
    The records to add after a run went back to its best checkpoint: cuts that fell away, and such as came back.

    Args:
        records (`Sequence[CheckRecord]`): Every check of the run.
        best (`int`): Training step of the best checkpoint.
        step (`int`): The training step at which the run went back to it.
    """
    present = standing_cuts(records)
    wanted = standing_cuts([record for record in records if record.step is None or record.step <= best])
    kept = next((place for place, pair in enumerate(zip(present, wanted)) if pair[0] is not pair[1]), None)
    kept = min(len(present), len(wanted)) if kept is None else kept
    reason = f"load_best_model_at_end went back to checkpoint-{best}"
    undone = [
        CheckRecord(
            "rolled_back",
            reason,
            [_undone(layer) for layer in cut.layers],
            step,
            parameters_before=cut.parameters_after,
            parameters_after=cut.parameters_before,
        )
        for cut in reversed(present[kept:])
    ]
    return undone + [replace(cut, reason=reason, step=step, seconds=0.0) for cut in wanted[kept:]]


def _undone(layer: LayerRecord) -> LayerRecord:
    before, after = layer.size_before, layer.size_after
    return LayerRecord(layer.name, layer.family, after, before, before, [], 0.0, 0.0)
