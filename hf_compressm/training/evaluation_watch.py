"""Judging a cut by the Trainer's own evaluation: when to evaluate, what to compare, and whether it got worse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from ..config import CompreSSMConfig
from ..errors import ConfigurationError

_PREFIX = "eval_"


class EvaluationWatch:
    """
    Compares a metric of the evaluation one step before a check with its value some steps after the cut.

    Args:
        config ([`CompreSSMConfig`]): Its `rollback_metric`, `rollback_tolerance` and `rollback_after` are used.
        args (`transformers.TrainingArguments`): Tell whether a greater value of the metric is better.
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
        self.judge_at: int | None = None

    def wants_evaluation(self, step: int) -> bool:
        """Whether the model has to be evaluated after this step."""
        # A run that was stopped between a step and its evaluation makes up for it.
        return step + 1 in self._due or (self.judge_at is not None and step >= self.judge_at)

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

    def cut_made(self, step: int) -> None:
        """A cut was made after this step; it is judged `rollback_after` steps later."""
        self.judge_at = step + self._config.rollback_after

    def evaluated(self, metrics: Mapping[str, Any], step: int) -> str | None:
        """
        Take note of an evaluation.

        Args:
            metrics (`Mapping[str, Any]`): What the evaluation gave.
            step (`int`): The training step.

        Returns:
            `str` or `None`: Why the cut has to be taken back, where it has to.
        """
        self._seen |= {name for name, value in metrics.items() if isinstance(value, (int, float))}
        value = metrics.get(self.name)
        if value is None or (self.judge_at is not None and step < self.judge_at):
            return None
        if self.judge_at is None:
            self._before = float(value) if math.isfinite(value) else self._before
            return None
        self.judge_at = None
        worse = self._sign * (self._before - float(value))
        # Written this way round, a value that is not a number counts as worse.
        if not worse <= self._config.rollback_tolerance:
            return (
                f"{self.name} went from {self._before:.4g} to {float(value):.4g}, "
                f"allowed is {self._config.rollback_tolerance:g}"
            )
        self._before = float(value)
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON values."""
        return {"before": self._before, "judge_at": self.judge_at}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an interrupted run."""
        self._before, self.judge_at = state.get("before"), state.get("judge_at")


def _greater_is_better(name: str, args: TrainingArguments) -> bool:
    """What the Trainer itself says of the metric, else its rule: everything but a loss is better when greater."""
    best = args.metric_for_best_model
    if best is not None and name in (best, _PREFIX + best) and args.greater_is_better is not None:
        return bool(args.greater_is_better)
    return not name.endswith("loss")
