"""When to check: the training steps after which the spectra are measured, whatever the evaluation does."""

from __future__ import annotations

import math

from ..config import CompreSSMConfig
from ..errors import ConfigurationError

# Waiting for an order to settle needs several looks; ten in the window cost little beside the training.
_CHECKS_WHEN_STABLE = 10


def check_steps(config: CompreSSMConfig, max_steps: int) -> list[int]:
    """
    The optimizer steps after which a check is due, ascending, each between 1 and `max_steps`.

    Without an `interval` that is the window's last step (with `when_stable`, ten steps spread over the window); with
    one, every `interval`-th step counted from the window's start. A run that has to arrive somewhere by the window's
    end (`strategy="target"`, `when_stable`) is checked there too.

    Args:
        config ([`CompreSSMConfig`]): Its `window`, `interval`, `when_stable`, `strategy` and `rollback_after` are used.
        max_steps (`int`): Optimizer steps of the whole run.

    Raises:
        [`~errors.ConfigurationError`]: no check falls into the window, or a cut would not be judged before the next
            check or the end of the run.

    Example:

    ```python
    >>> from hf_compressm import CompreSSMConfig
    >>> from hf_compressm.training.schedule import check_steps

    >>> check_steps(CompreSSMConfig(), 1000)
    [300]
    >>> check_steps(CompreSSMConfig(window=(0.1, 0.3), interval=50), 1000)
    [150, 200, 250, 300]
    >>> check_steps(CompreSSMConfig(window=(0, 500), interval=200, strategy="target", target_state_size=8), 1000)
    [200, 400, 500]

    ```
    """
    first, last = _window_in_steps(config.window, max_steps)
    interval = config.interval
    if interval is None and config.when_stable is not None:
        interval = max(1, (last - first) // _CHECKS_WHEN_STABLE)
    steps = [last] if interval is None else list(range(first + interval, last + 1, interval))
    if config.strategy == "target" or config.when_stable is not None:
        steps = sorted({*steps, last})
    if not steps or last > max_steps:
        raise ConfigurationError(
            f"no check falls into the window {config.window}: in a run of {max_steps} steps it covers the steps "
            f"{first} to {last}, and the interval is {config.interval}. Lower the interval, move the window, or "
            "train longer."
        )
    if config.judged_by_evaluation:
        _require_time_to_judge(steps, config.rollback_after, max_steps)
    return steps


def _window_in_steps(window: tuple[float, float], max_steps: int) -> tuple[int, int]:
    if window[1] > 1:
        return int(window[0]), int(window[1])
    # Rounding first: 0.1 * 30 is 3.0000000000000004 in floating point.
    first = math.ceil(round(window[0] * max_steps, 6))
    return first, max(1, math.floor(round(window[1] * max_steps, 6)))


def _require_time_to_judge(steps: list[int], rollback_after: int, max_steps: int) -> None:
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:])] + [max_steps - steps[-1] + 1]
    if rollback_after >= min(gaps):
        raise ConfigurationError(
            f"rollback_after is {rollback_after}, but only {min(gaps) - 1} steps lie between a check and the next one "
            f"(or the end of the run): the checks come after the steps {', '.join(map(str, steps))} of {max_steps}. "
            "Lower rollback_after, or raise the interval."
        )
    if steps[0] == 1:
        raise ConfigurationError(
            "the first check comes after step 1, before any evaluation that the cut could be compared with. Move the "
            "window's start or set an interval above 1."
        )
