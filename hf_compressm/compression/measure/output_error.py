"""What a cut does to the outputs of layers, measured on inputs that they really get."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import StateSpaceLayer, SumOverProcesses
from .model_pass import LossFunction, _run, evaluation_mode, move_to_device

_Pass = tuple[tuple, dict[str, Any], Tensor]


class OutputsOf:
    """
    The inputs and outputs of time-invariant layers in one pass, to compare those of changed layers with.

    Args:
        layers (`Sequence[StateSpaceLayer]`): The layers that may change; selective ones are left out.
        model (`torch.nn.Module`): The model that holds them. It runs in evaluation mode and without a gradient.
        batches (`Sequence`): Inputs of the model; the first is taken, and without one nothing is measured.
        loss_function (`Callable`, *optional*): Knows how the model takes a batch; the batch is given as it is when
            unset.
    """

    def __init__(
        self,
        layers: Sequence[StateSpaceLayer],
        model: nn.Module,
        batches: Sequence[Any],
        loss_function: LossFunction | None = None,
    ) -> None:
        self._layers = [layer for layer in layers if not layer.is_selective]
        self._model = model
        self._passes: dict[str, list[_Pass]] = defaultdict(list)
        # Another process can have a batch where this one has none.
        if self._layers and batches:
            with ExitStack() as stack:
                stack.enter_context(evaluation_mode(model))
                stack.enter_context(torch.no_grad())
                for layer in self._layers:
                    stack.enter_context(_watched(layer, self._passes))
                (loss_function or _run)(model, move_to_device(batches[0], next(model.parameters()).device))

    def errors(self, sum_over_processes: SumOverProcesses) -> dict[str, float]:
        r"""
        The relative error \\( \|y - y_r\| / \|y\| \\) of each layer's output, as the layer is now.

        Each layer gets the inputs that it had in the unchanged model, so that it answers for itself alone.

        Args:
            sum_over_processes (`Callable`): Adds a tensor over all processes.

        Returns:
            `dict[str, float]`: By the layer's name; layers that did not run, or whose output was zero, are missing.
        """
        if not self._layers:
            return {}
        sums = torch.zeros(len(self._layers), 2, dtype=torch.float64)
        with evaluation_mode(self._model), torch.no_grad():
            for row, layer in zip(sums, self._layers):
                for args, kwargs, before in self._passes.get(layer.name, ()):
                    after = layer.module(*args, **kwargs)
                    row[0] += float((after - before).double().square().sum())
                    row[1] += float(before.double().square().sum())
        errors, energies = sum_over_processes(sums).unbind(-1)
        named = zip(self._layers, errors.tolist(), energies.tolist())
        return {layer.name: (error / energy) ** 0.5 for layer, error, energy in named if energy > 0}


@contextmanager
def _watched(layer: StateSpaceLayer, passes: dict[str, list[_Pass]]) -> Iterator[None]:
    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor):
            passes[layer.name].append((args, kwargs, output))

    handle = layer.module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
