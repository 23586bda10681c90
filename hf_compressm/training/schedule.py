"""When to check: the training steps after which the spectra are measured, whatever the evaluation does."""

from __future__ import annotations

import math

from ..config import CompreSSMConfig
from ..errors import ConfigurationError


def check_steps(config: CompreSSMConfig, max_steps: int) -> list[int]:
    """
    The optimizer steps after which a check is due, ascending, each between 1 and `max_steps`.

    Without an `interval` that is the window's last step; with one, every `interval`-th step counted from the window's
    start.

    Args:
        config ([`CompreSSMConfig`]): Its `window` and `interval` are used.
        max_steps (`int`): Optimizer steps of the whole run.

    Raises:
        [`~errors.ConfigurationError`]: no check falls into the window.

    Example:

    ```python
    >>> from hf_compressm import CompreSSMConfig
    >>> from hf_compressm.training.schedule import check_steps

    >>> check_steps(CompreSSMConfig(), 1000)
    [100]
    >>> check_steps(CompreSSMConfig(window=(0.1, 0.3), interval=50), 1000)
    [150, 200, 250, 300]

    ```
    """
    # Rounding first: 0.1 * 30 is 3.0000000000000004 in floating point.
    first = math.ceil(round(config.window[0] * max_steps, 6))
    last = max(1, math.floor(round(config.window[1] * max_steps, 6)))
    steps = [last] if config.interval is None else list(range(first + config.interval, last + 1, config.interval))
    if not steps or last > max_steps:
        raise ConfigurationError(
            f"no check falls into the window {config.window}: in a run of {max_steps} steps it covers the steps "
            f"{first} to {last}, and the interval is {config.interval}. Lower the interval, widen the window, or "
            "train longer."
        )
    return steps
