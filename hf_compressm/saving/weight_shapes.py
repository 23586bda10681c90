"""The shapes of weights that lie in several files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


@functools.lru_cache(maxsize=1)
def weight_shapes(index: Path, modified: int) -> dict[str, Tensor]:
    """
    Tensors without values in the shapes of all that the files of an index hold, by name.

    Args:
        index (`Path`): The index of a model's weights, beside its files.
        modified (`int`): When it was written, in nanoseconds; the shapes of the latest index are kept.
    """
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shapes: dict[str, Tensor] = {}
    for name in files:
        path = index.parent / name
        if path.suffix != ".safetensors":
            shapes.update(torch.load(path, map_location="meta", weights_only=True))
            continue
        with safe_open(path, framework="pt") as file:
            keys = file.keys()  # such a file cannot be iterated over
            for key in keys:
                shapes[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    return shapes
