"""Fields of records that come from files: each has the type that its record's annotation names."""

from __future__ import annotations

import functools
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import InconsistentModelError
from ..validation import is_integer, is_number

_LONGEST = 60
_PLAIN = (str, type(None))


def known_fields(record: type, values: Any) -> dict[str, Any]:
    """
    The fields of a record, as JSON holds them. Those of a later version are left out.

    Args:
        record (`type`): A dataclass of plain values, lists and `dict`s of them, and other dataclasses.
        values (`dict[str, Any]`): What was read; whole numbers are never negative in a record.

    Raises:
        [`~errors.InconsistentModelError`]: it is no `dict`, lacks a field, or has a value of another type.
    """
    if not isinstance(values, dict):
        raise InconsistentModelError(f"a {record.__name__} is {shortened(values)}; it has to be an object.")
    hints = _hints(record)
    for field in fields(record):
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise InconsistentModelError(f"a {record.__name__} has no {field.name}.")
        elif not _fits(values[field.name], hints[field.name]):
            raise InconsistentModelError(
                f"{field.name} of a {record.__name__} is {shortened(values[field.name])}; it has to be {field.type}, "
                "finite and no whole number below 0."
            )
    return {name: value for name, value in values.items() if name in hints}


def shortened(value: Any) -> str:
    """A value for a message, however long it is."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _fits(value: Any, hint: Any) -> bool:
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return is_integer(value) and value >= 0
    if hint is float:
        return is_number(value)
    if hint in _PLAIN:
        return isinstance(value, hint)
    if is_dataclass(hint):
        return isinstance(value, dict)
    parts = get_args(hint)
    if get_origin(hint) is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, parts[0]) for entry in value)
    return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
