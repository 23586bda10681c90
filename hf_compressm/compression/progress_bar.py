"""The progress bars of what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], doing: str, unit: str, progress: bool | None) -> Iterable[Item]:
    """
    The same items, with a bar that says how many of them are done and goes away with the last.

    Args:
        items (`Iterable`): What is gone through.
        doing (`str`): What is done with them.
        unit (`str`): What one of them is.
        progress (`bool`, *optional*): Show the bar; when unset, only on a terminal.
    """
    return tqdm(items, desc=doing, unit=unit, leave=False, disable=None if progress is None else not progress)
