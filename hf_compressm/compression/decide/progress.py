"""Where in a run a check stands, read from the records, so that a resumed run sees what the uninterrupted one sees."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...config import CompreSSMConfig
from ...systems import rank_correlation
from ..history import CheckRecord, LayerRecord

logger = logging.getLogger(__name__)

# One high correlation can be chance; two running mean that the order has stopped moving.
_CHECKS_TO_SETTLE = 2

# A lack of usable data passes in a few steps or never.
_STEPS_TO_TRY_AGAIN = 8


@dataclass(frozen=True)
class Stage:
    """
    Where in a run a check is made, as far as the plan depends on it.

    Args:
        number (`int`): Which check it is, from 1 to `total`.
        total (`int`): Checks in the whole run.
        original_sizes (`Mapping[str, int]`): State sizes before the first cut; the present ones where a layer is
            missing.
        waiting (`frozenset[str]`): Layers that are not cut at this check, because their order has not settled or
            because they had their cut.
        scale (`float`): Share of the step that is taken, 1 unless cuts were taken back.
    """

    number: int = 1
    total: int = 1
    original_sizes: Mapping[str, int] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()
    scale: float = 1.0

    @property
    def is_last(self) -> bool:
        """Whether no check follows."""
        return self.number >= self.total


def stage_of(
    records: Sequence[CheckRecord],
    config: CompreSSMConfig,
    correlations: Mapping[str, float | None],
    number: int = 1,
    total: int = 1,
) -> Stage:
    """
    The stage of the check that follows the records.

    Args:
        records (`Sequence[CheckRecord]`): Everything that happened before.
        config ([`CompreSSMConfig`]): Its `when_stable` and `after_rollback` are used.
        correlations (`Mapping[str, float]`): For every layer the rank correlation of its states' order with that of
            the previous check, as the present check has measured it; None where nothing can be compared.
        number (`int`, *optional*, defaults to 1): Which check it is, from 1 to `total`.
        total (`int`, *optional*, defaults to 1): Checks in the whole run.
    """
    waiting: frozenset[str] = frozenset()
    if config.when_stable is not None:
        waiting = frozenset(
            name
            for name, correlation in correlations.items()
            if has_been_cut(records, name)
            or (number < total and not _has_settled(records, name, correlation, config.when_stable))
        )
    return Stage(number, total, _original_sizes(records), waiting, 0.5 ** _rollbacks(records))


def is_finished(records: Sequence[CheckRecord], config: CompreSSMConfig, names: Sequence[str]) -> bool:
    """
    Whether no later check can cut anything, so that none has to be made.

    Args:
        records (`Sequence[CheckRecord]`): Everything that happened so far.
        config ([`CompreSSMConfig`]): Its `when_stable` and `after_rollback` are used.
        names (`Sequence[str]`): All layers.
    """
    if config.after_rollback == "stop" and _rollbacks(records):
        return True
    return config.when_stable is not None and all(has_been_cut(records, name) for name in names)


def has_been_cut(records: Sequence[CheckRecord], name: str) -> bool:
    """Whether the last change of a layer's size was a cut that still stands."""
    changes = [layer for layer in _history_of(records, name) if layer.size_after != layer.size_before]
    return bool(changes) and changes[-1].size_after < changes[-1].size_before


def _has_settled(records: Sequence[CheckRecord], name: str, correlation: float | None, threshold: float) -> bool:
    running = [layer.rank_correlation for layer in _history_of(records, name)] + [correlation]
    latest = running[-_CHECKS_TO_SETTLE:]
    return len(latest) == _CHECKS_TO_SETTLE and all(value is not None and value >= threshold for value in latest)


def _history_of(records: Sequence[CheckRecord], name: str) -> list[LayerRecord]:
    return [layer for record in records for layer in record.layers if layer.name == name]


def _original_sizes(records: Sequence[CheckRecord]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for record in records:
        for layer in record.layers:
            sizes.setdefault(layer.name, layer.size_before)
    return sizes


def _rollbacks(records: Sequence[CheckRecord]) -> int:
    return sum(record.outcome == "rolled_back" for record in records)


def score_correlation(previous: Tensor | None, scores: Tensor) -> float | None:
    """
    The rank correlation of a layer's scores with those of the previous check, where they belong to the same states.

    Args:
        previous (`torch.Tensor` of shape `(N,)`, *optional*): The scores then.
        scores (`torch.Tensor` of shape `(N,)`): The scores now.
    """
    if previous is None or len(scores) < 2 or len(previous) != len(scores):
        return None
    return float(rank_correlation(previous, scores.cpu()))


def check_number(steps: Sequence[int], step: int) -> int:
    """
    Which of a run's checks is made after a step, from 1 on; one that makes up for a skipped check has that one's.

    Args:
        steps (`Sequence[int]`): The steps of all checks of the run, ascending.
        step (`int`): The training step.
    """
    return max(1, bisect_right(steps, step))


def warn_if_given_up(records: Sequence[CheckRecord], steps: Sequence[int], step: int, tries_again: bool) -> None:
    """
    Warn where the latest check could not be completed and no other follows it.

    Args:
        records (`Sequence[CheckRecord]`): Everything that happened, the check after `step` included.
        steps (`Sequence[int]`): The steps of all checks of the run, ascending.
        step (`int`): The latest training step.
        tries_again (`bool`): Whether skipped checks are tried again, and a next step is to come.
    """
    if records[-1].outcome != "skipped" or steps[-1] > step or (tries_again and makes_up(records, steps, step + 1)):
        return
    logger.warning(
        "no further check is made after step %d, and the state sizes stay as they are. The last one could not be "
        "completed: %s. Mend that, or compress the trained model with compress().",
        step,
        records[-1].reason,
    )


def makes_up(records: Sequence[CheckRecord], steps: Sequence[int], step: int) -> bool:
    """
    Whether a check is made after this step in place of a skipped one, which is tried again at each of a few steps.

    Args:
        records (`Sequence[CheckRecord]`): Everything that happened before.
        steps (`Sequence[int]`): The steps of all checks of the run, ascending.
        step (`int`): The training step.
    """
    skipped = bool(records) and records[-1].outcome == "skipped" and records[-1].step == step - 1
    due = bisect_right(steps, step)
    return skipped and due > 0 and step - steps[due - 1] <= _STEPS_TO_TRY_AGAIN


def combined_seed(seed: int, step: int | None) -> int:
    """One seed for every (run, step), so that a resumed run draws what the uninterrupted one draws."""
    return (seed * 1_000_003 + (0 if step is None else step)) % 2**63
