"""Judging a cut by the Trainer's own evaluation: when to evaluate, what to compare, and whether it got worse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..compression import PendingCut
from ..config import CompreSSMConfig
from ..errors import ConfigurationError

_PREFIX = "eval_"


@dataclass(frozen=True)
class Verdict:
    """
    What an evaluation says of a cut.

    Args:
        accepted (`bool`): Whether the cut may stay.
        reason (`str`): Why not, where it may not.
    """

    accepted: bool
    reason: str = ""


class EvaluationWatch:
    """
    Compares a metric of the evaluation one step before a check with its value some steps after the cut.

    Args:
        config ([`CompreSSMConfig`]): Its `rollback_metric`, `rollback_tolerance` and `rollback_after` are used.
        args (`transformers.TrainingArguments`): Whether a greater value of the metric is better is read from them.
        due (`Collection[int]`): The steps after which a check is made.

    Raises:
        [`~errors.ConfigurationError`]: the run makes no evaluations.
    """

    def __init__(self, config: CompreSSMConfig, args: TrainingArguments, due: Collection[int]) -> None:
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise ConfigurationError(
                f"rollback_metric is {config.rollback_metric!r}, a metric of the evaluation, but eval_strategy is "
                "'no'. Give the Trainer an eval_dataset and an eval_strategy, or set "
                "rollback_metric='calibration_loss'."
            )
        name = config.rollback_metric
        self.name = name if name.startswith(_PREFIX) else _PREFIX + name
        self._config = config
        self._due = due
        self._sign = 1 if _greater_is_better(self.name, args) else -1
        self._before: float | None = None
        self._seen: set[str] = set()

    def wants_evaluation(self, step: int, pending: PendingCut | None) -> bool:
        """
        Whether the model has to be evaluated after this step.

        Args:
            step (`int`): The training step.
            pending ([`~compression.PendingCut`], *optional*): The cut that is not yet accepted.
        """
        # A run that was stopped between a step and its evaluation makes up for it.
        return step + 1 in self._due or (pending is not None and step >= pending.judge_at)

    def require_comparison(self) -> None:
        """
        Raise when the coming cut could not be compared with anything.

        Raises:
            [`~errors.ConfigurationError`]: the evaluations so far have not given the metric.
        """
        if self._before is None:
            raise ConfigurationError(
                f"rollback_metric is {self._config.rollback_metric!r}, but the evaluation gives no {self.name!r}"
                f"{': it gives ' + ', '.join(sorted(self._seen)) if self._seen else ''}. Name one of its metrics."
            )

    def evaluated(self, metrics: Mapping[str, Any], step: int, pending: PendingCut | None) -> Verdict | None:
        """
        Take note of an evaluation.

        Args:
            metrics (`Mapping[str, Any]`): What the evaluation gave.
            step (`int`): The training step.
            pending ([`~compression.PendingCut`], *optional*): The cut that is not yet accepted.

        Returns:
            [`Verdict`] or `None`: None where no cut is to be judged by this evaluation.
        """
        self._seen |= {name for name, value in metrics.items() if isinstance(value, (int, float))}
        value = metrics.get(self.name)
        if value is None or (pending is not None and step < pending.judge_at):
            return None
        if pending is None:
            self._before = float(value) if math.isfinite(value) else self._before
            return None
        worse = self._sign * (self._before - float(value))
        # Written this way round, a value that is not a number counts as worse.
        if not worse <= self._config.rollback_tolerance:
            reason = f"{self.name} went from {self._before:.4g} to {float(value):.4g}, "
            return Verdict(False, f"{reason}allowed is {self._config.rollback_tolerance:g}")
        self._before = float(value)
        return Verdict(True)

    def state(self, pending: PendingCut | None) -> dict[str, Any]:
        """
        What a resumed run has to know, as JSON values.

        Args:
            pending ([`~compression.PendingCut`], *optional*): The cut that is not yet accepted.
        """
        return {"before": self._before, "judge_at": None if pending is None else pending.judge_at}

    def restore(self, state: Mapping[str, Any]) -> int | None:
        """
        Go on from the state of an interrupted run.

        Returns:
            `int` or `None`: The step from which on the cut is judged that was pending then, where one was.
        """
        self._before = state.get("before")
        return state.get("judge_at")


def _greater_is_better(name: str, args: TrainingArguments) -> bool:
    """What the Trainer itself says of the metric, else its rule: everything but a loss is better when greater."""
    best = args.metric_for_best_model
    if best is not None and name in (best, _PREFIX + best) and args.greater_is_better is not None:
        return bool(args.greater_is_better)
    return not name.endswith("loss")
