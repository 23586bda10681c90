"""What a checkpoint in several files holds, while transformers loads it file by file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers.trainer_utils import load_sharded_checkpoint

from ..saving.weight_shapes import weight_shapes


class CheckpointFiles(NamedTuple):
    """
    A checkpoint in several files that is being loaded.

    Args:
        folder (`str`): Where they are.
        index (`Path`): The file that says which tensor is in which.
        names (`frozenset[str]`): The names of all tensors.
        is_first (`bool`): Whether the first of the files is at hand.
    """

    folder: str
    index: Path
    names: frozenset[str]
    is_first: bool


def files_of_checkpoint() -> CheckpointFiles | None:
    """
    The sharded checkpoint that is being loaded on this thread; None where none is.

    transformers hands a model one file after another. Which folder they are from, only the calling function knows.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not load_sharded_checkpoint.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    # Private API of transformers.
    found = frame.f_locals
    is_first = found["shard_file"] == found["shard_files"][0]
    return CheckpointFiles(found["folder"], Path(found["load_index"]), frozenset(found["loaded_keys"]), is_first)


def shapes_of_whole_checkpoint() -> dict[str, Tensor] | None:
    """
    Tensors without values in the shapes of a sharded checkpoint that is being loaded on this thread; None where none
    is.

    No single file shows the form of a layer whose tensors lie in several.
    """
    files = files_of_checkpoint()
    return None if files is None else weight_shapes(files.index, os.stat(files.index).st_mtime_ns)
