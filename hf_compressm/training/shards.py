"""The shapes of all tensors of a checkpoint in several files, while transformers loads it file by file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import Tensor
from transformers.trainer_utils import load_sharded_checkpoint

from ..saving.weight_shapes import weight_shapes


def shapes_of_whole_checkpoint() -> dict[str, Tensor] | None:
    """
    Tensors without values in the shapes of a sharded checkpoint that is being loaded on this thread; None where none
    is.

    transformers hands a model one file after another, and none of them shows the form of a layer whose tensors lie in
    several. Which folder they are from, only the calling function knows.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not load_sharded_checkpoint.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    # Private API of transformers.
    index = Path(frame.f_locals["load_index"])
    return weight_shapes(index, os.stat(index).st_mtime_ns)
