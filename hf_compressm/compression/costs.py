"""What a layer's state costs: parameters, memory of the recurrent state, and the time of a training step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import ScanInputs, StateSpaceLayer, fast_cpu_scan
from .measure.model_pass import evaluation_mode, model_loss, move_to_device

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class StateCost:
    """
    What the state of one layer costs at one size.

    Args:
        parameters (`int`): Parameters whose number depends on the state size.
        state_bytes (`int`, *optional*): Memory of the recurrent state of one sequence, in the precision that the layer
            computes with; unknown for a selective layer that was never run.
    """

    parameters: int
    state_bytes: int | None


def state_costs(
    model: nn.Module, layers: Sequence[StateSpaceLayer], batch: Mapping[str, Any] | None = None
) -> dict[str, StateCost]:
    """
    What the state of each layer costs now.

    Args:
        model (`torch.nn.Module`): The model that holds the layers.
        layers (`Sequence[StateSpaceLayer]`): From [`~architectures.find_layers`].
        batch (`Mapping`, *optional*): One batch; a selective layer shows the shape of its state only while it runs.
    """
    observers = {layer.name: _ShapeObserver() for layer in layers if layer.system() is None}
    if observers and batch is not None:
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(fast_cpu_scan())
            for layer in layers:
                if layer.name in observers:
                    stack.enter_context(layer.observed(observers[layer.name]))
            model(**move_to_device(batch, next(model.parameters()).device))
    costs = {}
    for layer in layers:
        system = layer.system()
        if system is None:
            state_bytes = observers[layer.name].state_bytes
        else:
            # One complex number of the weights' precision for each pole.
            precision = next(iter(layer.state_parameters().values())).element_size()
            state_bytes = system.lam.numel() * 2 * precision
        costs[layer.name] = StateCost(parameters_at(layer, layer.state_size), state_bytes)
    return costs


def parameters_at(layer: StateSpaceLayer, size: int) -> int:
    """How many parameters of a layer would depend on a state of this size."""
    names = layer.state_parameters()
    return sum(math.prod(shape) for name, shape in layer.state_shapes(size).items() if name in names)


def training_step_seconds(model: nn.Module, batch: Mapping[str, Any], repetitions: int = 5) -> float:
    """
    Median duration of a forward and a backward pass, after two for warming up. The gradients are as before after it.

    Args:
        model (`torch.nn.Module`): Returns a loss for the batch.
        batch (`Mapping`): One batch with labels.
        repetitions (`int`, *optional*, defaults to 5): Passes that are timed.
    """
    device = next(model.parameters()).device
    batch = move_to_device(batch, device)
    seconds = []
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with evaluation_mode(model), torch.enable_grad(), fast_cpu_scan():
        for _ in range(_WARM_UP_STEPS + repetitions):
            start = time.perf_counter()
            model_loss(model, batch).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    for parameter, gradient in gradients:
        parameter.grad = gradient
    return statistics.median(seconds[_WARM_UP_STEPS:])


def resize_for_timing(layers: Sequence[StateSpaceLayer], size: int) -> None:
    """
    Give all layers another state size with small equal values, which take the time that other values take.

    The model is of no other use afterwards.

    Args:
        layers (`Sequence[StateSpaceLayer]`): The layers of one model.
        size (`int`): The state size of all of them.
    """
    for layer in layers:
        layer.resize(size)
        with torch.no_grad():
            for parameter in layer.state_parameters().values():
                parameter.fill_(0.01)


class _ShapeObserver:
    """Notes how large the state of a scan is."""

    def __init__(self) -> None:
        self._bytes: dict[int | None, int] = {}

    def observe(self, inputs: ScanInputs, output: Tensor) -> Tensor:
        """Look at a scan; its output goes on unchanged."""
        self._bytes[inputs.part] = inputs.states_per_sequence * inputs.u.element_size()
        return output

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the state of one sequence, where a scan was seen."""
        return sum(self._bytes.values()) or None
