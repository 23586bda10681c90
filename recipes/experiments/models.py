"""Any family behind one name: `--model lru|s4d|mamba|mamba2` works on every recipe."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

from transformers import PreTrainedModel

import hf_compressm.models as models

from .data import SequenceData

FAMILIES = {
    "lru": ("LRUConfig", "LRUForSequenceClassification"),
    "s4d": ("S4DConfig", "S4DForSequenceClassification"),
    "mamba": ("MambaClassifierConfig", "MambaForSequenceClassification"),
    "mamba2": ("Mamba2ClassifierConfig", "Mamba2ForSequenceClassification"),
}

FAMILIES_WITH_SIZES_PER_LAYER = ("lru", "s4d")
"""Families whose checkpoints can hold another state size in each layer."""


def build_model(model_settings: dict[str, Any], data: SequenceData, state_size: int) -> PreTrainedModel:
    """
    A classifier for a task.

    Settings that the family's config does not know are left out when they are ones of another family in the same
    file (`r_min` for S4D, for example), so that a recipe's file serves all families.

    Args:
        model_settings (`dict`): `name`, and fields of the family's config.
        data ([`SequenceData`]): The task.
        state_size (`int`): Of every layer.

    Raises:
        `ValueError`: the family is unknown.
    """
    settings = dict(model_settings)
    name = settings.pop("name")
    if name not in FAMILIES:
        raise ValueError(f"model.name is {name!r}; choose one of {', '.join(FAMILIES)}.")
    config_class, model_class = (getattr(models, class_name) for class_name in FAMILIES[name])
    known = _fields_of(config_class)
    settings = {key: value for key, value in settings.items() if key in known}
    if name == "mamba2":
        settings = {**_mamba2_heads(settings["hidden_size"]), **settings}
    config = config_class(**{**settings, **data.model_settings(), "state_size": state_size})
    return model_class(config)


def state_sizes(model: PreTrainedModel) -> list[int]:
    """The state size of every layer."""
    size = model.config.state_size
    return list(size) if isinstance(size, (list, tuple)) else [int(size)] * model.config.num_hidden_layers


def _mamba2_heads(hidden_size: int, expand: int = 2, largest_head: int = 64) -> dict[str, int]:
    """Heads that fill the inner width, whose published number belongs to a width of 4,096."""
    head = math.gcd(expand * hidden_size, largest_head)
    return {"expand": expand, "head_dim": head, "num_heads": expand * hidden_size // head, "n_groups": 1}


def _fields_of(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)
