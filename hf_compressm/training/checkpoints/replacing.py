"""Checkpoint folders that a crash left half-written or half-deleted, and old ones that are about to be replaced."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

from ...files import checkpoint_folder, checkpoints_in
from .integrity import problem_with
from .running_mark import is_active

logger = logging.getLogger(__name__)

INCOMPLETE_PREFIX = "incomplete-"
REPLACED_PREFIX = "replaced-"
UNFINISHED_PREFIX = "unfinished-"


def set_aside_incomplete(output_dir: str | os.PathLike) -> list[Path]:
    """
    Rename the checkpoints of a run that a crash left incomplete, so that none is resumed from; nothing is deleted.

    A checkpoint that was whole and was being replaced when the crash came gets its name back. Nothing is touched while
    a training of another process on this machine writes to the folder.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder, which need not exist.

    Returns:
        `list[Path]`: The folders' new paths, `incomplete-checkpoint-N`.
    """
    if is_active(output_dir):
        logger.info("%s belongs to a training that is under way; its checkpoints are left alone.", output_dir)
        return []
    moved = []
    for folder, problem in _incomplete(output_dir):
        moved.append(_free_name(folder.with_name(INCOMPLETE_PREFIX + folder.name)))
        folder.rename(moved[-1])
        logger.warning("%s is incomplete (%s) and is now called %s.", folder, problem, moved[-1].name)
    for folder in sorted(Path(output_dir).glob(f"{UNFINISHED_PREFIX}checkpoint-*")):
        # A copy that was being made of a checkpoint, which is still there.
        shutil.rmtree(folder)
    for folder in sorted(Path(output_dir).glob(f"{REPLACED_PREFIX}checkpoint-*")):
        original = folder.with_name(folder.name.removeprefix(REPLACED_PREFIX))
        if original.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(original)
            logger.warning("%s was about to be replaced when the run ended; it has its name back.", original)
    return moved


def wait_until_set_aside(output_dir: str | os.PathLike, seconds: float = 60.0) -> None:
    """
    Wait for the process that does [`set_aside_incomplete`], so that all see the same checkpoints when they resume.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        seconds (`float`, *optional*, defaults to 60): After this long the folder is taken as it is.
    """
    end = time.monotonic() + seconds
    while not is_active(output_dir) and time.monotonic() < end:
        try:
            if not _incomplete(output_dir) and not list(Path(output_dir).glob(f"{REPLACED_PREFIX}checkpoint-*")):
                return
        except OSError:
            # A folder was renamed while it was looked at.
            pass
        time.sleep(0.1)


def _incomplete(output_dir: str | os.PathLike) -> list[tuple[Path, str]]:
    """The checkpoints of a run that cannot be resumed from, and why."""
    problems = [(folder, problem_with(folder)) for folder in checkpoints_in(output_dir)]
    return [(folder, problem) for folder, problem in problems if problem is not None]


def before_replacing(output_dir: str | os.PathLike, step: int) -> None:
    """
    Rename a checkpoint that the Trainer is about to write over, until the new one is whole.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        step (`int`): The training step that is about to be saved.
    """
    folder = checkpoint_folder(output_dir, step)
    if folder.is_dir():
        aside = folder.with_name(REPLACED_PREFIX + folder.name)
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def after_replacing(output_dir: str | os.PathLike, step: int) -> None:
    """
    Delete what [`before_replacing`] renamed, now that the new checkpoint is whole.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        step (`int`): The training step that was saved.
    """
    folder = checkpoint_folder(output_dir, step)
    aside = folder.with_name(REPLACED_PREFIX + folder.name)
    if aside.is_dir():
        shutil.rmtree(aside)


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.{number}"), number + 1
    return candidate
