"""Which layers a calibration pass has reached: a frozen teacher or an idle tower inside a model it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...architectures import StateSpaceLayer, SumOverProcesses
from ...errors import CalibrationError

logger = logging.getLogger(__name__)


class ReachOfLayers:
    """
    Whether layers whose Gramians need no data take part in the loss.

    Args:
        names (`Sequence[str]`): The layers.
        with_gradient (`bool`): Whether a layer that runs without a gradient counts as not reached.
    """

    def __init__(self, names: Sequence[str], with_gradient: bool) -> None:
        self._reached = dict.fromkeys(names, "run")
        self._with_gradient = with_gradient

    @property
    def needs_graph(self) -> bool:
        """Whether the coming batch has to be run with a gradient, to see which layer turns it off."""
        return self._with_gradient and any(self._reached.values())

    def ran(self, name: str) -> None:
        """A layer runs."""
        if not self._with_gradient or torch.is_grad_enabled():
            self._reached[name] = ""
        elif self._reached[name]:
            self._reached[name] = "reached by the gradient"

    def missing(self) -> dict[str, str]:
        """What the batches did not do with each layer that was not reached."""
        return {name: what for name, what in self._reached.items() if what}


@contextmanager
def watched_reach(layers: Sequence[StateSpaceLayer], with_gradient: bool) -> Iterator[ReachOfLayers]:
    """
    While the context is open, note which layers run.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers whose Gramians need no data.
        with_gradient (`bool`): Whether a layer that runs without a gradient counts as not reached.
    """
    reach = ReachOfLayers([layer.name for layer in layers], with_gradient)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            reach.ran(name)

        return hook

    handles = [layer.module.register_forward_pre_hook(hook_of(layer.name)) for layer in layers]
    try:
        yield reach
    finally:
        for handle in handles:
            handle.remove()


def reached_everywhere(
    names: Sequence[str], missing: Mapping[str, str | None], sum_over_processes: SumOverProcesses
) -> dict[str, str]:
    """
    The layers that some process has not reached, and why; the same layers in all processes.

    Args:
        names (`Sequence[str]`): All layers.
        missing (`Mapping[str, str]`): What this process did not do with a layer, None where nothing is missing.
        sum_over_processes (`Callable`): Adds a tensor over all processes.

    Raises:
        [`~errors.CalibrationError`]: no layer was reached.
    """
    flags = torch.tensor([1.0, *(float(not missing.get(name)) for name in names)], dtype=torch.float64)
    processes, *counts = sum_over_processes(flags).tolist()
    unreached = {
        name: f"was not {what} by the calibration batches"
        if (what := missing.get(name))
        else "was not reached in every process"
        for name, count in zip(names, counts)
        if count < processes
    }
    if names and len(unreached) == len(names):
        name, why = next(iter(unreached.items()))
        raise CalibrationError(
            f"{name} {why}, nor any other state-space layer, so that their Gramians are unknown. Calibrate with "
            "batches that use them, and turn off activation checkpointing that hides them from torch.autograd.grad."
        )
    if unreached:
        told = "; ".join(f"{name} {why}" for name, why in unreached.items())
        logger.warning("layers that keep their state: %s.", told)
    return unreached
