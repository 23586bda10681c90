"""How much memory the recurrent state of a layer takes, as a calibration pass sees it."""

from __future__ import annotations

from torch import Tensor

from ...architectures import ScanInputs, StateSpaceLayer
from .observers import GramianObserver


class StateBytesObserver:
    """
    Shows the scans of a selective layer to another observer, and notes how large their states are.

    Args:
        observer ([`~compression.measure.observers.GramianObserver`]): The other one.
    """

    def __init__(self, observer: GramianObserver) -> None:
        self._observer = observer
        self._bytes: dict[int | None, int] = {}

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Look at a scan; what the other observer makes of its output goes on."""
        self._bytes[inputs.part] = inputs.states_per_sequence * inputs.u.element_size()
        return self._observer.observe(inputs, output)

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the state of one sequence, where a scan was seen."""
        return sum(self._bytes.values()) or None


def state_bytes_of(layer: StateSpaceLayer, observer: StateBytesObserver | None) -> int | None:
    """
    Memory of the recurrent state of one sequence; None for a selective layer that was never run.

    Args:
        layer (`StateSpaceLayer`): The layer.
        observer ([`StateBytesObserver`], *optional*): What has watched it, where it is selective.
    """
    system = layer.system()
    if system is None:
        return None if observer is None else observer.state_bytes
    # One complex number of the weights' precision for each pole.
    return system.lam.numel() * 2 * next(iter(layer.state_parameters().values())).element_size()
