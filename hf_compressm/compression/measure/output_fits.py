"""All that fits cut layers to the outputs that they had, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import nn

from ...architectures import StateSpaceLayer
from ..processes import Processes
from .mixer_fit import MixerFit
from .model_pass import LossFunction
from .output_fit import ReadoutFit


class OutputFit(Protocol):
    """Fits layers that were cut to the outputs that they had before."""

    def remember_outputs(self) -> None:
        """Keep what the layers give, before anything is cut; once is enough."""
        ...

    def fit(self, names: Collection[str]) -> set[str]:
        """Fit those of the named layers that it knows, in the cut model; returns those that have changed."""
        ...


def output_fits(
    layers: Sequence[StateSpaceLayer],
    model: nn.Module,
    batches: Sequence[Any],
    loss_function: LossFunction | None,
    processes: Processes,
    seed: int,
    progress: bool | None = None,
) -> tuple[OutputFit, ...]:
    """
    The fits of a model's layers. Nothing is run before one of them is asked to remember outputs.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers in the order in which they run.
        model (`torch.nn.Module`): The model that holds them.
        batches (`Sequence`): Inputs of the model.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        seed (`int`): Draws steps and sequences.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.
    """
    told = (layers, model, batches, loss_function, processes, seed, progress)
    return ReadoutFit(*told), MixerFit(*told)
