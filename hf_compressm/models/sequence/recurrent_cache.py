"""What sequence models keep of the steps that they have read."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# What outputs call their cache; transformers 5.24 gave all caches one name.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurrentCache(Cache):
    """
    The state of every layer after the steps that a model has read, and how many steps these were.

    Args:
        num_hidden_layers (`int`): Number of layers.
    """

    # A cache without a fixed length: `generate` keeps the padding mask as it is, (batch, length).
    is_compileable = False

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * num_hidden_layers
        self.seen_steps = 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: unlike the linear layers of transformers, this cache counts what it has read."""
        return [False] * len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of steps that the model has read."""
        return self.seen_steps

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen_steps = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences with the given indices, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the sequences with the given indices, in this order."""
        self.states = [s if s is None else s.index_select(0, indices.to(s.device)) for s in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.states = [s if s is None else s.repeat_interleave(repeats, dim=0) for s in self.states]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a recurrent state cannot forget its last steps."""
        raise NotImplementedError("A recurrent cache cannot be cropped: its states hold no single step. Start anew.")
