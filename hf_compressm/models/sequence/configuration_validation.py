"""What the configurations of sequence models check alike."""

from __future__ import annotations

from typing import Any

LARGEST_STATE_SIZE = 65536


def require_counts(config: Any, *names: str) -> None:
    """
    Raise `ValueError` where a number of a configuration is below 1; one that is unset is not.

    Args:
        config (`transformers.PreTrainedConfig`): The configuration.
        names (`str`): The names of its numbers.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; allowed is 1 or more.")


def require_choices(config: Any, **choices: tuple[str, ...]) -> None:
    """
    Raise `ValueError` where a setting of a configuration is none of those that are allowed.

    Args:
        config (`transformers.PreTrainedConfig`): The configuration.
        choices (`tuple[str, ...]`): What is allowed, by the setting's name.
    """
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; allowed are {', '.join(map(repr, allowed))}.")


def require_dropout(config: Any) -> None:
    """Raise `ValueError` where the dropout of a configuration is no probability below 1."""
    if not 0 <= config.dropout < 1:
        raise ValueError(f"`dropout` is {config.dropout}; allowed are 0 and above, below 1.")


class SequenceSettings:
    """What a configuration says whose `state_size` is a number, or a list with one number for each layer."""

    state_size: int | list[int]
    num_hidden_layers: int

    @property
    def state_sizes(self) -> list[int]:
        """The state size of each layer."""
        if isinstance(self.state_size, list):
            return list(self.state_size)
        return [self.state_size] * self.num_hidden_layers

    def require_settings(self, **choices: tuple[str, ...]) -> None:
        """
        Raise `ValueError` where a setting that LRU and S4D share is out of its range.

        Args:
            choices (`tuple[str, ...]`): What is allowed of further settings, by their names.
        """
        require_counts(self, "hidden_size", "num_hidden_layers", "vocab_size", "input_size")
        sizes = self.state_sizes
        if len(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"`state_size` has {len(sizes)} numbers and `num_hidden_layers` is {self.num_hidden_layers}; give one "
                "number for each layer, or one for all of them."
            )
        if not all(1 <= size <= LARGEST_STATE_SIZE for size in sizes):
            raise ValueError(f"`state_size` is {self.state_size}; allowed are 1 to {LARGEST_STATE_SIZE} in each layer.")
        require_choices(self, norm=("batch", "layer"), pooling=("mean", "last", "max"), **choices)
        require_dropout(self)
