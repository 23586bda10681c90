"""
Configurations of compressed selective models: those of transformers, and the state size of each layer.

`CompressedMamba2Config`, `CompressedJambaConfig` and so on are made from `Mamba2Config`, `JambaConfig` and so on when
they are first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .stock_families import family_of

PREFIX = "Compressed"

LARGEST_STATE_SIZE = 65536

when_first_built: list[Callable[[type[PreTrainedConfig]], None]] = []
"""Called once with each compressed configuration class, just before its first configuration is built."""

_built: set[type[PreTrainedConfig]] = set()


class LayerSizes:
    """What a compressed configuration adds to that of transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        if type(self) not in _built:
            _built.add(type(self))
            for call in when_first_built:
                call(type(self))
        super().__post_init__(**kwargs)
        validate_sizes(self)
        if _mixes(self):
            holder, size = sized_config(self), max(self.projected_state_sizes)
            setattr(holder, self.state_size_name, size)
            _write_nested(self, vars(holder), size)

    def to_dict(self) -> dict[str, Any]:
        """
        The fields as they are saved.

        Where layers mix states, the stock field for the state size is that of a scan, not of the projections: a stock
        class would otherwise load all weights but the mixing matrices, and compute something else.
        """
        values = super().to_dict()
        if _mixes(self):
            fields, size = values["text_config"] if self.sees else values, min(self.state_sizes)
            if self.state_size_name in fields:
                fields[self.state_size_name] = size
            _write_nested(self, fields, size)
        return values


def sized_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    What holds the stock field for the state size: a compressed configuration, or its `text_config`.

    Args:
        config (`transformers.PreTrainedConfig`): A compressed configuration, maybe of a model that also sees.
    """
    return config.text_config if config.sees else config


def _write_nested(config: PreTrainedConfig, fields: dict[str, Any], size: int) -> None:
    """Put a size where the class of a stock configuration finds it first, if these fields have it there."""
    outer, inner = config.nested_size or (None, None)
    if isinstance(found := fields.get(outer), dict) and inner in found:
        fields[outer] = {**found, inner: size}


def _mixes(config: PreTrainedConfig) -> bool:
    sizes, projected = getattr(config, "state_sizes", None), getattr(config, "projected_state_sizes", None)
    return bool(sizes) and bool(projected) and list(sizes) != list(projected)


def validate_sizes(config: PreTrainedConfig) -> None:
    """
    Check the state sizes of the layers in a compressed configuration.

    Args:
        config (`transformers.PreTrainedConfig`): A configuration with `state_sizes` and `projected_state_sizes`.

    Raises:
        `ValueError`: a size is out of its range, or the two lists do not fit each other.
    """
    sizes, projected = config.state_sizes, config.projected_state_sizes
    if sizes is None and projected is None:
        return
    if sizes is None or projected is None or len(sizes) != len(projected):
        raise ValueError(
            f"`state_sizes` is {sizes} and `projected_state_sizes` {projected}; both must have one number for each "
            "state-space layer."
        )
    for size, full in zip(sizes, projected):
        if not 1 <= size <= full <= LARGEST_STATE_SIZE:
            raise ValueError(
                f"a layer has `state_sizes` {size} and `projected_state_sizes` {full}; they must be from 1 to "
                f"{LARGEST_STATE_SIZE}, and the first at most the second."
            )


@functools.cache
def compressed_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """
    The compressed configuration class of a stock one, made at its first use.

    The class has two more fields. `state_sizes` (`list[int]`) is the number of states of each state-space layer, in the
    model's order. `projected_state_sizes` (`list[int]`) is the number of entries that B and C have where they are
    projected; a layer in which it is the larger one mixes them just before its scan.

    Args:
        stock (`type`): One of the configuration classes in `STOCK_FAMILIES`.

    Raises:
        `KeyError`: the class is none of them.
    """
    row = family_of(stock.__name__)
    if row is None:
        raise KeyError(stock.__name__)
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with the state size of each layer; see `compressed_config_class`.",
        "__annotations__": {"state_sizes": list[int] | None, "projected_state_sizes": list[int] | None},
        "state_sizes": None,
        "projected_state_sizes": None,
        "model_type": f"compressed_{stock.model_type}",
        "state_size_name": row.config_size_name,
        "nested_size": row.nested_size,
        "sees": stock.__name__ == row.seeing_config,
    }
    made = strict(type(PREFIX + stock.__name__, (LayerSizes, stock), namespace))
    made.register_for_auto_class()
    return made


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(PREFIX)
    row = family_of(stock)
    if stock == name or row is None or stock not in row.configs:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return compressed_config_class(row.class_named(stock))
