"""The Trainer's checkpoints in a folder, files of JSON, and files that are written as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .errors import InconsistentModelError

_CHECKPOINT = "checkpoint-{}"


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a step."""
    return Path(output_dir) / _CHECKPOINT.format(step)


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint, by its folder's name; None where it is no checkpoint's."""
    match = re.fullmatch(_CHECKPOINT.format(r"(\d+)"), folder.name)
    return int(match[1]) if match else None


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """The folders of the Trainer's checkpoints, in the order of their steps; none where there is no such directory."""
    folders = [path for path in Path(output_dir).glob(_CHECKPOINT.format("*")) if path.is_dir()]
    return sorted((path for path in folders if checkpoint_step(path) is not None), key=checkpoint_step)


def read_json_object(path: Path) -> dict[str, Any]:
    """
    What a JSON file holds.

    Args:
        path (`Path`): The file.

    Raises:
        `FileNotFoundError`: there is none.
        [`~errors.InconsistentModelError`]: it is a folder, or no JSON object.
    """
    if path.is_dir():
        raise InconsistentModelError(f"{path} is a folder; a file with a JSON object belongs there.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # JSON that is nested too deeply, and text that is not UTF-8, are no JSON either.
    except (ValueError, RecursionError) as error:
        raise InconsistentModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InconsistentModelError(f"{path} is a JSON {type(found).__name__}; give an object.")
    return found


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
