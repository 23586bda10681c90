"""How much memory the recurrent state of a layer takes, as a calibration pass sees it."""

from __future__ import annotations

from torch import Tensor

from ...architectures import ScanInputs, StateSpaceLayer
from .observers import GramianObserver


class StateBytesObserver:
    """
    Shows the scans of a selective layer to another observer, and counts the numbers in their states.

    Args:
        observer ([`~compression.measure.observers.GramianObserver`]): The other one.
    """

    def __init__(self, observer: GramianObserver) -> None:
        self._observer = observer
        self._states: dict[int | None, int] = {}

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Look at a scan; what the other observer makes of its output goes on."""
        self._states[inputs.part] = inputs.states_per_sequence
        return self._observer.observe(inputs, output)

    @property
    def states_per_sequence(self) -> int | None:
        """How many numbers the state of one sequence holds, where a scan was seen."""
        return sum(self._states.values()) or None


def state_bytes_of(layer: StateSpaceLayer, observer: StateBytesObserver | None) -> int | None:
    """
    Memory of the recurrent state of one sequence, in the precision of the layer's weights, whatever a calibration under
    autocast computes in; None for a selective layer that was never run.

    Args:
        layer (`StateSpaceLayer`): The layer.
        observer ([`StateBytesObserver`], *optional*): What has watched it, where it is selective.
    """
    # Decays are often kept in a higher precision than the rest.
    size = min(parameter.element_size() for parameter in layer.state_parameters().values())
    system = layer.system()
    if system is not None:
        # One complex number for each pole.
        return system.lam.numel() * 2 * size
    states = None if observer is None else observer.states_per_sequence
    return None if states is None else states * size
