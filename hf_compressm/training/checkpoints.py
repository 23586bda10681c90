"""Checkpoint folders that a crash left half-written or half-deleted, and old ones that are about to be replaced."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import zipfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

INCOMPLETE_PREFIX = "incomplete-"
REPLACED_PREFIX = "replaced-"

# One file, shards of the Hub's form, of FSDP's and of DeepSpeed's.
_WEIGHTS = ("*.safetensors", "*.bin", "**/*.distcp", "**/*.pt")

# Where the Trainer, FSDP and DeepSpeed keep the optimizer's state.
_OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def problem_with(folder: str | os.PathLike) -> str | None:
    """
    Why a checkpoint folder cannot be resumed from, or None where it is whole.

    The Trainer writes the weights first and its state last, each in place, so a folder that a crash left behind lacks
    its last files or holds a file that ends too early; one whose deletion was interrupted lacks any of them. Nothing is
    unpickled here.

    Args:
        folder (`str` or `os.PathLike`): A folder that the Trainer wrote.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json, which is written last"
    except ValueError:
        return "its trainer_state.json ends too early"
    for file in folder.glob("*.safetensors"):
        if not _is_whole_safetensors(file):
            return f"its {file.name} ends too early"
    for file in folder.glob("*.pt*"):
        if file.stat().st_size == 0 or not zipfile.is_zipfile(file):
            return f"its {file.name} ends too early"
    return _missing_part(folder)


def _missing_part(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except ValueError:
            return f"its {index.name} ends too early"
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            return f"it lacks {missing[0]}"
    found = [file.name for pattern in _WEIGHTS for file in folder.glob(pattern)]
    if set(found) <= {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}:
        return "it has no weights"
    # With save_only_model none of the three is there; one without the others was lost.
    training_state = {
        "the optimizer's state": any(list(folder.glob(pattern)) for pattern in _OPTIMIZER_STATES),
        "the random state": bool(list(folder.glob("rng_state*.pth"))),
    }
    absent = [name for name, present in training_state.items() if not present]
    return f"it lacks {absent[0]}" if len(absent) == 1 else None


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

    A checkpoint that was whole and was being replaced when the crash came gets its name back.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder, which need not exist.

    Returns:
        `list[Path]`: The folders' new paths, `incomplete-checkpoint-N`.
    """
    moved = []
    for folder in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if not folder.is_dir() or not folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit():
            continue
        problem = problem_with(folder)
        if problem is not None:
            moved.append(_free_name(folder.with_name(INCOMPLETE_PREFIX + folder.name)))
            folder.rename(moved[-1])
            logger.warning("%s is incomplete (%s) and is now called %s.", folder, problem, moved[-1].name)
    for folder in sorted(Path(output_dir).glob(f"{REPLACED_PREFIX}{PREFIX_CHECKPOINT_DIR}-*")):
        original = folder.with_name(folder.name.removeprefix(REPLACED_PREFIX))
        if original.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(original)
            logger.warning("%s was about to be replaced when the run ended; it has its name back.", original)
    return moved


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


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.{number}"), number + 1
    return candidate
