"""Which layers a calibration pass has reached: a frozen teacher or an idle tower inside a model it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...architectures import StateSpaceLayer, SumOverProcesses
from ...errors import CalibrationError

logger = logging.getLogger(__name__)


@contextmanager
def watched_reach(layers: Sequence[StateSpaceLayer]) -> Iterator[set[str]]:
    """
    While the context is open, note which layers run.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers whose Gramians need no data.

    Returns:
        `set[str]`: The names of those that have not run so far.
    """
    idle = {layer.name for layer in layers}

    def hook_of(name: str) -> Any:
        return lambda module, args: idle.discard(name)

    handles = [layer.module.register_forward_pre_hook(hook_of(layer.name)) for layer in layers]
    try:
        yield idle
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
        listed = "; ".join(f"{name} {why}" for name, why in unreached.items())
        logger.warning("layers that keep their state: %s.", listed)
    return unreached
