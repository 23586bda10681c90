"""Checks of settings: what is wrong, which value, what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
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


def require_share_or_zero(name: str, value: Any) -> None:
    """Raise [`~errors.ConfigurationError`] unless the value is at least 0 and below 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigurationError(f"{name} is {value!r}; give a number in [0, 1), for example 0.05.")


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


def require_rows(name: str, value: Any) -> None:
    """Raise [`~errors.ConfigurationError`] unless the value is unset, a share, or a whole number of at least 2."""
    is_share = isinstance(value, float) and is_number(value) and 0 < value < 1
    if value is not None and not is_share and not (is_integer(value) and value >= 2):
        raise ConfigurationError(
            f"{name} is {value!r}; give a share strictly between 0 and 1, for example 0.5, or a whole number of rows, "
            "for example 32."
        )


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


def require_batches(name: str, batches: Any) -> Any:
    """
    Raise unless the value is unset or can be gone through batch by batch; returns it.

    Args:
        name (`str`): The argument.
        batches (`object`): Its value.

    Raises:
        [`~errors.ConfigurationError`]: it is a number, a text or a single batch.
    """
    if batches is not None and (isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable)):
        raise ConfigurationError(
            f"{name} is a {type(batches).__name__}; give a list of batches (their number is a setting of "
            "CompreSSMConfig)."
        )
    return batches


def require_function(name: str, function: Any) -> Any:
    """
    Raise unless the value is unset or callable; returns it.

    Args:
        name (`str`): The argument.
        function (`object`): Its value.

    Raises:
        [`~errors.ConfigurationError`]: it cannot be called.
    """
    if function is not None and not callable(function):
        raise ConfigurationError(f"{name} is {function!r}; give a function of the model and a batch.")
    return function


def settings_in(text: str | bytes) -> dict[str, Any]:
    """
    The settings in a JSON text.

    Args:
        text (`str` or `bytes`): A JSON object.

    Raises:
        [`~errors.ConfigurationError`]: it is no such text, or names a setting twice.
    """
    if not isinstance(text, (str, bytes, bytearray)):
        raise ConfigurationError(f"the configuration is a {type(text).__name__}; give the text of a JSON object.")
    try:
        text = text if isinstance(text, str) else bytes(text).decode("utf-8")
        settings = json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"the configuration is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigurationError(f"the configuration is a JSON {type(settings).__name__}; give an object.")
    return settings


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = sorted({name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1})
    if repeated:
        raise ConfigurationError(f"{', '.join(map(repr, repeated))} is given more than once; keep one of the values.")
    return dict(pairs)
