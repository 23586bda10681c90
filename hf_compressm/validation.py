"""Checks of settings: what is wrong, which value, what to do."""

from __future__ import annotations

import math
import re
from typing import Any

from .errors import ConfigurationError


def is_number(value: Any) -> bool:
    """Whether the value is a finite real number (and not a bool)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def is_integer(value: Any) -> bool:
    """Whether the value is an int (and not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_share(name: str, value: Any) -> None:
    """Raise [`~errors.ConfigurationError`] unless the value is strictly between 0 and 1."""
    if not is_number(value) or not 0 < value < 1:
        raise ConfigurationError(f"{name} is {value!r}; give a number strictly between 0 and 1, for example 0.01.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Raise [`~errors.ConfigurationError`] unless the value is one of the choices.

    Args:
        name (`str`): The setting.
        value (`object`): Its value.
        choices (`tuple[str, ...]`): What is allowed.
    """
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def require_integer(name: str, value: Any, minimum: int) -> None:
    """
    Raise [`~errors.ConfigurationError`] unless the value is a whole number of at least the minimum.

    Args:
        name (`str`): The setting.
        value (`object`): Its value.
        minimum (`int`): The smallest allowed one.
    """
    if not is_integer(value) or value < minimum:
        raise ConfigurationError(f"{name} is {value!r}; give a whole number of at least {minimum}.")


def require_bool(name: str, value: Any) -> None:
    """Raise [`~errors.ConfigurationError`] unless the value is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; give True or False.")


def require_window(name: str, window: Any) -> None:
    """Raise [`~errors.ConfigurationError`] unless it is a pair of shares, or a pair of steps, with start < end."""
    if not isinstance(window, tuple) or len(window) != 2 or not all(is_number(edge) for edge in window):
        raise ConfigurationError(
            f"{name} is {window!r}; give two shares of the run, for example (0.0, 0.1), or two steps, for example "
            "(0, 2000)."
        )
    if not 0 <= window[0] < window[1]:
        raise ConfigurationError(f"{name} is {window!r}, which is empty or leaves the run; give 0 <= start < end.")
    if window[1] > 1 and not all(is_integer(edge) for edge in window):
        raise ConfigurationError(
            f"{name} is {window!r}; an end above 1 means steps, so give two whole numbers, for example (0, 2000)."
        )


def require_pattern(name: str, value: Any) -> None:
    """
    Raise unless the value is unset, a regular expression, or a list of names.

    Args:
        name (`str`): The setting.
        value (`object`): Its value.

    Raises:
        [`~errors.ConfigurationError`]: it is of another type, empty, or no regular expression.
    """
    listed = isinstance(value, (list, tuple)) and value and all(isinstance(part, str) and part for part in value)
    if value is None or listed:
        return
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"{name} is {value!r}; give a regular expression for whole layer names, or a list of names or their ends."
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigurationError(f"{name} is {value!r}, which is no regular expression: {error}.") from error
