"""Write a file as a whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""What the Trainer calls a checkpoint's folder, with its step."""


def replace_file(path: Path, content: bytes) -> None:
    """
    Replace a file as a whole, so that an interruption or a full disk leaves the old one.

    A symbolic link at that place is replaced and never followed.

    Args:
        path (`Path`): The file.
        content (`bytes`): Its new content.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
