"""Checkpoint folders that a crash left half-written or half-deleted, and old ones that are about to be replaced."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import struct
import time
import zipfile
from pathlib import Path

import psutil
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

INCOMPLETE_PREFIX = "incomplete-"
REPLACED_PREFIX = "replaced-"
_REPLACED = f"{REPLACED_PREFIX}{PREFIX_CHECKPOINT_DIR}-*"
UNFINISHED_PREFIX = "unfinished-"
LOCK_NAME = ".compressm_running"

# One file, shards of the Hub's form, of FSDP's and of DeepSpeed's.
_WEIGHTS = ("*.safetensors", "*.bin", "**/*.distcp", "**/*.pt")

# What the Trainer writes beside the weights, all of it in torch's zip form; files of other names are the user's.
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def problem_with(folder: str | os.PathLike) -> str | None:
    """
    Why a checkpoint folder cannot be resumed from, or None where it is whole.

    The Trainer writes the weights first and its state last, each in place, so a folder that a crash left behind lacks
    its last files or holds a file that ends too early; one whose deletion was interrupted lacks any of them. Nothing is
    unpickled here.

    Args:
        folder (`str` or `os.PathLike`): A folder that the Trainer wrote.
    """
    try:
        return _problem_with(Path(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"a file in it cannot be read: {error!r}"


def _problem_with(folder: Path) -> str | None:
    state = folder / "trainer_state.json"
    if not state.is_file():
        return "it has no trainer_state.json, which is written last"
    if not _is_whole_json(state):
        return "its trainer_state.json ends too early"
    for file in folder.glob("*.safetensors"):
        if not _is_whole_safetensors(file):
            return f"its {file.name} ends too early"
    for file in (file for pattern in _TRAINING_STATE for file in folder.glob(pattern)):
        if file.stat().st_size == 0 or not zipfile.is_zipfile(file):
            return f"its {file.name} ends too early"
    return _missing_part(folder)


def _is_whole_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _missing_part(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if not _is_whole_json(index):
            return f"its {index.name} ends too early"
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            return f"it lacks {missing[0]}"
    found = [file.name for pattern in _WEIGHTS for file in folder.glob(pattern)]
    if set(found) <= {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}:
        return "it has no weights"
    return None


def _is_whole_safetensors(file: Path) -> bool:
    """Whether the file is as long as its own header says."""
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        try:
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        except ValueError:
            return False
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return file.stat().st_size == 8 + length + end


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
    for folder in sorted(Path(output_dir).glob(f"{UNFINISHED_PREFIX}{PREFIX_CHECKPOINT_DIR}-*")):
        # A copy that was being made of a checkpoint, which is still there.
        shutil.rmtree(folder)
    for folder in sorted(Path(output_dir).glob(_REPLACED)):
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
            if not _incomplete(output_dir) and not list(Path(output_dir).glob(_REPLACED)):
                return
        except OSError:
            # A folder was renamed while it was looked at.
            pass
        time.sleep(0.1)


def _incomplete(output_dir: str | os.PathLike) -> list[tuple[Path, str]]:
    """The checkpoints of a run that cannot be resumed from, and why."""
    folders = sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    checkpoints = [
        folder
        for folder in folders
        if folder.is_dir() and folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
    ]
    problems = [(folder, problem_with(folder)) for folder in checkpoints]
    return [(folder, problem) for folder, problem in problems if problem is not None]


def before_replacing(output_dir: str | os.PathLike, step: int) -> None:
    """
    Rename a checkpoint that the Trainer is about to write over, until the new one is whole.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        step (`int`): The training step that is about to be saved.
    """
    folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
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
    aside = Path(output_dir) / f"{REPLACED_PREFIX}{PREFIX_CHECKPOINT_DIR}-{step}"
    if aside.is_dir():
        shutil.rmtree(aside)


def mark_active(output_dir: str | os.PathLike) -> None:
    """Tell other processes that a training writes to a folder, until [`mark_ended`] or the end of this process."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": _start_of(os.getpid())}
        (Path(output_dir) / LOCK_NAME).write_text(json.dumps(owner), encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written to: %s", output_dir, error)


def mark_ended(output_dir: str | os.PathLike) -> None:
    """Take back what [`mark_active`] told."""
    with contextlib.suppress(OSError):
        (Path(output_dir) / LOCK_NAME).unlink(missing_ok=True)


def is_active(output_dir: str | os.PathLike) -> bool:
    """Whether another process of this machine that still runs has marked a folder as its own."""
    try:
        owner = json.loads((Path(output_dir) / LOCK_NAME).read_text(encoding="utf-8"))
        if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
            return False
        pid, start = int(owner["pid"]), owner.get("start")
        with contextlib.suppress(PermissionError):  # it runs, as another user
            os.kill(pid, 0)
    except (OSError, OverflowError, ValueError, KeyError, TypeError):
        return False
    found = _start_of(pid)
    # Marks of earlier versions of this library have no start.
    return start is None or found is None or start == found


def _start_of(pid: int) -> str | None:
    """
    When a process started, which another one that gets its number later does not share; None where it is not told.

    One that has ended, and whose parent has not asked for its outcome yet, has its number but is no training any more.
    """
    try:
        # In clock ticks since this boot: unlike a date, no correction of the clock changes them. The name, in
        # parentheses, may hold spaces.
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "ended" if values[0] in "ZX" else f"{boot} {values[19]}"
    except (OSError, IndexError):
        pass
    try:
        return str(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError):
        return None


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.{number}"), number + 1
    return candidate
