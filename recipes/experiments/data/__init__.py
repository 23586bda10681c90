"""The data of the recipes: from the Hub by name, from local files in their published forms, or generated."""

from __future__ import annotations

from typing import Any

from .images import image_data
from .listops import listops_data
from .pathfinder import pathfinder_data
from .sequence_data import SequenceCollator, SequenceData
from .text import imdb_data, retrieval_data

KINDS = {
    "images": image_data,
    "listops": listops_data,
    "pathfinder": pathfinder_data,
    "imdb": imdb_data,
    "retrieval": retrieval_data,
}

__all__ = ["KINDS", "SequenceCollator", "SequenceData", "load_data"]


def load_data(settings: dict[str, Any]) -> SequenceData:
    """
    Training and test set of a recipe.

    Args:
        settings (`dict`): `kind`, and the arguments of that kind's function.

    Raises:
        `ValueError`: the kind is unknown, or the files are in no known form.
    """
    arguments = dict(settings)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"data.kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    return KINDS[kind](**arguments)
