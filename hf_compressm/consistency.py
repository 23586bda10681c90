"""Which settings fit together."""

from __future__ import annotations

from typing import Any

from .errors import ConfigurationError
from .validation import is_number

CALIBRATION_LOSS = "calibration_loss"


def require_consistent(settings: Any) -> None:
    """
    Raise unless settings, each of which is allowed by itself, fit together.

    Args:
        settings ([`CompreSSMConfig`]): All settings.

    Raises:
        [`~errors.ConfigurationError`]: two of them contradict each other, or one has no effect.
    """
    _require_consistent_budget(settings)
    _require_consistent_target(settings)
    _require_consistent_rollback(settings)


def _require_consistent_budget(settings: Any) -> None:
    if settings.budget == "model" and (settings.uniform or settings.strategy != "tolerance"):
        raise ConfigurationError(
            "budget='model' gives each layer the states that its share of the Hankel energy asks for; it needs "
            f"uniform=False and strategy='tolerance', but uniform is {settings.uniform} and strategy "
            f"{settings.strategy!r}."
        )


def _require_consistent_target(settings: Any) -> None:
    given = [name for name in ("target_state_size", "target_ratio") if getattr(settings, name) is not None]
    if settings.strategy == "target" and len(given) != 1:
        raise ConfigurationError(
            f"the strategy 'target' needs one of target_state_size and target_ratio; {len(given)} of them are given."
        )
    if settings.strategy != "target" and given:
        raise ConfigurationError(
            f"{given[0]} is given, but the strategy is {settings.strategy!r}; set strategy='target' or leave it out."
        )
    size = settings.target_state_size
    if size is not None and (size < settings.min_state_size or size % settings.multiple_of):
        raise ConfigurationError(
            f"target_state_size is {size}; with min_state_size {settings.min_state_size} and multiple_of "
            f"{settings.multiple_of} it has to be a multiple of {settings.multiple_of} and at least "
            f"{settings.min_state_size}."
        )


def _require_consistent_rollback(settings: Any) -> None:
    tolerance, metric = settings.rollback_tolerance, settings.rollback_metric
    if tolerance is not None and (not is_number(tolerance) or tolerance < 0):
        raise ConfigurationError(f"rollback_tolerance is {tolerance!r}; give a number of at least 0, or None.")
    if not isinstance(metric, str) or not metric:
        raise ConfigurationError(
            f"rollback_metric is {metric!r}; give {CALIBRATION_LOSS!r} or the name of a metric of the evaluation, "
            "for example 'eval_loss'."
        )
    if tolerance is None and (settings.rollback_after or metric != CALIBRATION_LOSS):
        raise ConfigurationError(
            f"rollback_metric is {metric!r} and rollback_after {settings.rollback_after}, but without a "
            "rollback_tolerance no cut is taken back. Set it, for example to 0.02."
        )
    if settings.rollback_after and metric == CALIBRATION_LOSS:
        raise ConfigurationError(
            f"rollback_after is {settings.rollback_after}, but the calibration loss is compared at the cut itself; set "
            "rollback_metric to a metric of the evaluation, for example 'eval_loss', or leave rollback_after at 0."
        )
