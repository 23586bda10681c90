"""The training loop of the benchmarks of linear attention, which a cut can be made in the middle of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, int], Tensor]
Trained = tuple[nn.Module, torch.optim.Optimizer]
_WARM_UP = 50


def train(run: Trained, loss_at: Loss, first: int, last: int, steps: int, learning_rate: float) -> None:
    """
    Train from one step to another of a run, in place.

    Args:
        run (`tuple[torch.nn.Module, torch.optim.Optimizer]`): A model and its optimizer.
        loss_at (`Callable`): Takes the model and a step and returns the loss; the same data for the same step.
        first (`int`): The first step.
        last (`int`): The step before which to stop.
        steps (`int`): All steps of the run.
        learning_rate (`float`): The largest one: it rises for 50 steps and falls along a cosine.
    """
    model, optimizer = run
    model.train()
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_at(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def snapshots(
    run: Trained, loss_at: Loss, moments: Sequence[float], steps: int, learning_rate: float
) -> dict[float, Trained]:
    """Train to the end, in place, and return copies at some moments, given as shares of the run."""
    step, copies = 0, {}
    for moment in sorted({*moments, 1.0}):
        train(run, loss_at, step, round(moment * steps), steps, learning_rate)
        step = round(moment * steps)
        copies[moment] = copy.deepcopy(run)
    return copies
