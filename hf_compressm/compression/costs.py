"""What a cut adds to the weights and saves in the state, whether that pays, and the time of a training step."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures import LayerReduction, fast_cpu_scan
from .measure.model_pass import LossFunction, evaluation_mode, model_loss, move_to_device

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class CutCost:
    """
    What a cut changes in one layer or in several.

    Args:
        added_parameters (`int`): Parameters that it adds; negative where it takes some away.
        added_bytes (`int`): The same in bytes.
        saved_bytes (`int`, *optional*): Bytes that the recurrent state of one sequence becomes smaller by, where that
            is known.
    """

    added_parameters: int
    added_bytes: int
    saved_bytes: int | None

    @property
    def pays(self) -> bool:
        """
        Whether the recurrent state of a single sequence saves at least what is added to the weights.

        Only the mixed form adds parameters: two matrices of N x r for each group, while the state loses N - r numbers
        for each channel. The operations of a step grow with the same two numbers, so that where the state does not save
        what the matrices add, a training step takes 0.9 to 1.1 of what it took
        (`recipes/benchmarks/results/mixed_cost.md`). What is not known to be bad pays.
        """
        return self.added_bytes <= 0 or self.saved_bytes is None or self.saved_bytes >= self.added_bytes


def state_bytes_at(size: int, present: int, state_bytes: int | None) -> int | None:
    """
    Memory of a layer's recurrent state with another state size; it is one array with N entries for all else it holds.

    Args:
        size (`int`): The other state size.
        present (`int`): The present one.
        state_bytes (`int`, *optional*): The memory now, from a [`Calibration`]; None where it is not known.
    """
    return None if state_bytes is None else state_bytes // present * size


def cost_of_cut(reduction: LayerReduction, state_bytes: int | None) -> CutCost:
    """
    What a cut changes in its layer, which has not been written to yet.

    Args:
        reduction ([`LayerReduction`]): The cut.
        state_bytes (`int`, *optional*): Memory of the layer's recurrent state before it, of one sequence.
    """
    after = state_bytes_at(reduction.state_size, reduction.layer.state_size, state_bytes)
    new = [change.new for change in (*reduction.parameters, *reduction.added)]
    old = [change.old for change in reduction.parameters]
    return CutCost(
        sum(p.numel() for p in new) - sum(p.numel() for p in old),
        sum(p.numel() * p.element_size() for p in new) - sum(p.numel() * p.element_size() for p in old),
        None if after is None else state_bytes - after,
    )


def total_cost(costs: Sequence[CutCost]) -> CutCost:
    """
    What cuts of several layers change together.

    Args:
        costs (`Sequence[CutCost]`): That of each layer.
    """
    saved = [cost.saved_bytes for cost in costs]
    return CutCost(
        sum(cost.added_parameters for cost in costs),
        sum(cost.added_bytes for cost in costs),
        None if None in saved else sum(saved),
    )


def cuts_that_do_not_pay(
    reductions: Sequence[LayerReduction], state_bytes: Mapping[str, int | None], together: bool
) -> dict[str, CutCost]:
    """
    The cuts that add more to the weights than they take from the recurrent state of one sequence.

    Args:
        reductions (`Sequence[LayerReduction]`): What a check would do to the layers.
        state_bytes (`Mapping[str, int]`): Memory of each layer's recurrent state now, by the layer's name.
        together (`bool`): All layers are cut or none is, so that their sums decide.

    Returns:
        `dict[str, CutCost]`: What each would change, by the layer's name.
    """
    costs = {r.layer.name: cost_of_cut(r, state_bytes.get(r.layer.name)) for r in reductions}
    if together:
        return {} if total_cost(list(costs.values())).pays else costs
    return {name: cost for name, cost in costs.items() if not cost.pays}


def step_timer(
    model: nn.Module, batch: Any, loss_function: LossFunction | None = None
) -> Callable[[], float | None] | None:
    """
    What times a training step of a model as it is by then; None for a batch that is no mapping.

    Args:
        model (`torch.nn.Module`): The model.
        batch (`Any`): One batch.
        loss_function (`Callable`, *optional*): As in [`training_step_seconds`].
    """
    return functools.partial(training_step_seconds, model, batch, loss_function) if isinstance(batch, Mapping) else None


def training_step_seconds(
    model: nn.Module, batch: Mapping[str, Any], loss_function: LossFunction | None = None, repetitions: int = 5
) -> float | None:
    """
    Median duration of a forward and a backward pass, after two for warming up; None for a model of which nothing is
    trained. The gradients are as before after it.

    Args:
        model (`torch.nn.Module`): The model.
        batch (`Mapping`): One batch.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            when unset, for a batch with labels.
        repetitions (`int`, *optional*, defaults to 5): Passes that are timed.
    """
    device = next(model.parameters()).device
    batch = move_to_device(batch, device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    seconds, loss_of = [], loss_function or model_loss
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with evaluation_mode(model), torch.enable_grad(), fast_cpu_scan():
        for _ in range(_WARM_UP_STEPS + repetitions):
            start = time.perf_counter()
            loss_of(model, batch).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    for parameter, gradient in gradients:
        parameter.grad = gradient
    return statistics.median(seconds[_WARM_UP_STEPS:])
