"""How a config holds the state size: as a number, or as a share of another of its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ConfigSize:
    """
    The field of a config that holds the state size.

    Args:
        name (`str`): The field: a whole number N; with `share_of` a float, the share of the entries of all heads.
        share_of (`str`, *optional*): The field that the float is a share of, such as `"hidden_size"` of xLSTM.
        heads (`str`, *optional*): The field with the number of heads that the share is divided among.
    """

    name: str
    share_of: str | None = None
    heads: str | None = None

    def read(self, config: Any) -> int | None:
        """The state size in a config, or None where it has none."""
        found = getattr(config, self.name, None)
        if self.share_of is None:
            return found if isinstance(found, int) else None
        if not isinstance(found, (int, float)):
            return None
        return round(found * getattr(config, self.share_of)) // self._heads(config)

    def value(self, config: Any, size: int) -> int | float:
        """
        What the field has to be for a state size: no share a rounding too small, which reads as one entry less.

        Args:
            config (`object`): The config that holds it.
            size (`int`): The state size.
        """
        if self.share_of is None:
            return int(size)
        whole, wanted = getattr(config, self.share_of), size * self._heads(config)
        share = wanted / whole
        return share if share * whole >= wanted else math.nextafter(share, math.inf)

    def _heads(self, config: Any) -> int:
        return 1 if self.heads is None else getattr(config, self.heads)
