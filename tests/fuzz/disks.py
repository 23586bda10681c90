"""Disks that refuse: every function by which this library writes files raises an `OSError`."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

CODES = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO)
FUNCTIONS = ("os.replace", "os.fsync", "os.open", "os.fdopen", "os.makedirs", "os.mkdir", "tempfile.mkstemp")


def refusing_disk(draw: random.Random) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """
    What refuses and why, and a context in which it does.

    Args:
        draw (`random.Random`): Chooses both.
    """
    code, what = draw.choice(CODES), draw.choice(FUNCTIONS)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return f"{what} gives {errno.errorcode[code]}", lambda: mock.patch(what, refuse)
