"""Second moments of what enters the matrices that write to the state of layers and read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...architectures import ScanInputs, StateSpaceLayer
from ...systems import MOST_ENTRIES


class EntryMoments:
    """
    Sums of the outer products of what enters the matrices of layers, by layer and by the scan's name for it.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers whose scans will be watched.
    """

    def __init__(self, layers: Sequence[StateSpaceLayer]) -> None:
        self._entries = {layer.name: set(layer.fitted_parameters().values()) for layer in layers}
        self._sums: dict[tuple[str, str], dict[int, Tensor]] = {}

    def watcher(self, name: str) -> _Watcher:
        """
        An observer that adds the scans of one layer.

        Args:
            name (`str`): The layer's name.
        """
        return _Watcher(self, name)

    @torch.no_grad()
    def add(self, name: str, inputs: ScanInputs) -> None:
        """
        Add one scan.

        Args:
            name (`str`): The layer's name.
            inputs ([`~architectures.ScanInputs`]): The scan.
        """
        for attribute in self._entries[name]:
            entries = getattr(inputs, attribute).detach().float()
            if entries.shape[-1] > MOST_ENTRIES:
                continue
            moment = torch.einsum("bl...n,bl...m->...nm", entries, entries).double().cpu()
            sums, part = self._sums.setdefault((name, attribute), {}), inputs.part or 0
            sums[part] = sums[part] + moment if part in sums else moment

    def of(self, name: str, attribute: str) -> Tensor | None:
        """
        The sum over what was seen, float64 on the CPU; None where nothing was, or there are too many entries.

        Args:
            name (`str`): The layer's name.
            attribute (`str`): `"u"`, `"B"` or `"C"`, see [`StateSpaceLayer.fitted_parameters`].

        Returns:
            `torch.Tensor` of shape `(..., n, n)` or `None`: With the layer's groups or parts first, where it has some.
        """
        parts = self._sums.get((name, attribute))
        if not parts:
            return None
        moments = [parts[part] for part in sorted(parts)]
        return moments[0] if len(moments) == 1 else torch.stack(moments)


@dataclass(frozen=True)
class _Watcher:
    """Shows the scans of one layer to the moments and leaves them as they are."""

    moments: EntryMoments
    name: str

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        self.moments.add(self.name, inputs)
        return output
