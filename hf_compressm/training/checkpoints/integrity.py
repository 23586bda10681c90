"""Whether a checkpoint is whole."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

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
