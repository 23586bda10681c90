"""Which settings fit together."""

from __future__ import annotations

from typing import Any

from .errors import ConfigurationError
from .validation import is_number, require_rows

CALIBRATION_LOSS = "calibration_loss"

# The fall of accuracy that the strategy "pragmatic" of Chahine et al. (2026) still accepts.
_PRAGMATIC_ROLLBACK_TOLERANCE = 0.02

_MAX_LOSS_INCREASE = 0.005

# The strategies that look at a setting, and what the setting is where nobody has set it.
_READ_BY = {
    "tolerance": (("tolerance",), 0.01),
    "keep_ratio": (("fixed", "pragmatic"), 0.5),
    "max_loss_increase": (("loss",), None),
    "allow_growth": (("tolerance", "loss"), False),
}


def inferred(settings: Any, short: dict[str, Any]) -> dict[str, Any]:
    """
    What settings that are unset become because of others.

    Args:
        settings ([`CompreSSMConfig`]): The settings as they were given.
        short (`dict[str, Any]`): What was given by a short name, by its full name; None where it was not.

    Raises:
        [`~errors.ConfigurationError`]: a short name contradicts another setting.
    """
    changes: dict[str, Any] = {name: tuple(v) for name, v in vars(settings).items() if isinstance(v, list)}
    given = {name: value for name, value in short.items() if value is not None}
    for name, value in given.items():
        if getattr(settings, name) is not None or len(given) > 1 or settings.strategy not in (None, "target"):
            raise ConfigurationError(
                f"{name.removeprefix('target_')} is {value!r}, which sets the size of the strategy 'target'; leave out "
                "strategy and every other setting of a size."
            )
    strategy = settings.strategy
    if strategy is None:
        strategy = "target" if given else "tolerance" if settings.max_loss_increase is None else "loss"
    if strategy == "loss" and settings.max_loss_increase is None:
        changes["max_loss_increase"] = _MAX_LOSS_INCREASE
    if strategy == "pragmatic" and settings.rollback_tolerance is None:
        changes["rollback_tolerance"] = _PRAGMATIC_ROLLBACK_TOLERANCE
    return {**changes, **given, "strategy": strategy}


def without_ignored(settings: dict[str, Any]) -> dict[str, Any]:
    """
    The same settings without those that their strategy ignores.

    Args:
        settings (`dict[str, Any]`): Settings by name.
    """
    strategy = settings.get("strategy")
    ignored = [name for name, (readers, _) in _READ_BY.items() if strategy is not None and strategy not in readers]
    return {name: value for name, value in settings.items() if name not in ignored}


def require_consistent(settings: Any) -> None:
    """
    Raise unless settings, each of which is allowed by itself, fit together.

    Args:
        settings ([`CompreSSMConfig`]): All settings.

    Raises:
        [`~errors.ConfigurationError`]: two of them contradict each other, or one has no effect.
    """
    _require_no_ignored(settings)
    require_rows("projection_rows", settings.projection_rows)
    if settings.projection_rows is not None and settings.stock:
        raise ConfigurationError(
            f"projection_rows is {settings.projection_rows!r}, which narrows the projections of layers that mix "
            "states; with stock=True none does, and a cut makes the projections as small as the state. Leave one "
            "of them out."
        )
    _require_consistent_budget(settings)
    _require_consistent_target(settings)
    _require_consistent_rollback(settings)


def _require_no_ignored(settings: Any) -> None:
    for name, (readers, default) in _READ_BY.items():
        if settings.strategy not in readers and getattr(settings, name) != default:
            raise ConfigurationError(
                f"{name} is {getattr(settings, name)!r}, which the strategy {settings.strategy!r} ignores; set "
                f"strategy={readers[0]!r} or leave it out."
            )


def _require_consistent_budget(settings: Any) -> None:
    if settings.budget == "model" and (settings.uniform or settings.strategy not in ("tolerance", "loss")):
        raise ConfigurationError(
            "budget='model' gives each layer the states that its share of the Hankel energy asks for; it needs "
            f"uniform=False and strategy='tolerance' or 'loss', but uniform is {settings.uniform} and strategy "
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
    size, multiple = settings.target_state_size, settings.multiple_of
    if size is not None and size % multiple:
        raise ConfigurationError(
            f"target_state_size is {size} and multiple_of is {multiple}; give a multiple of {multiple}, for example "
            f"{-(-size // multiple) * multiple}."
        )
    if size is not None and size < settings.min_state_size:
        raise ConfigurationError(f"target_state_size is {size} and min_state_size is {settings.min_state_size}.")


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
