"""Sampled steps of what the projections of layers give for B and C, before a mixed layer combines it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import NarrowableLayer
from ...errors import CalibrationError
from .model_pass import LossFunction, _run, evaluation_mode, move_to_device

# What is kept of one layer: 32 MB in single precision.
_NUMBERS = 2**23
_MOST_STEPS = 2**13
# A regression on N entries needs some times as many steps, whatever they take.
_STEPS_PER_ENTRY = 8


@dataclass(frozen=True)
class ProjectedEntries:
    """
    What a layer projects at some steps.

    Args:
        B (`torch.Tensor` of shape `(K, N)` or `(K, groups, N)`): For B.
        C (`torch.Tensor` of the same shape): For C, at the same steps.
    """

    B: Tensor
    C: Tensor


class _Sampler:
    """Keeps steps by random keys, the smallest of all that were seen, so that each is as likely as any other."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._keys = torch.empty(0)
        self._steps: list[Tensor] = []

    def show(self, B: Tensor, C: Tensor) -> None:
        new = [entries.detach().flatten(0, 1) for entries in (B, C)]
        keys = torch.cat([self._keys, torch.rand(len(new[0]), generator=self._generator)])
        size = new[0].shape[-1]
        most = max(_STEPS_PER_ENTRY * size, min(_MOST_STEPS, _NUMBERS // (2 * new[0][0].numel())))
        kept = keys.argsort()[:most]
        first = len(self._keys)
        old, late = kept[kept < first], kept[kept >= first] - first
        self._keys = keys[torch.cat([old, late + first])]
        held = self._steps or [part[:0].float().cpu() for part in new]
        self._steps = [torch.cat([h[old], n[late.to(n.device)].float().cpu()]) for h, n in zip(held, new)]

    def result(self, name: str) -> ProjectedEntries:
        if not all(torch.isfinite(part).all() for part in self._steps):
            raise CalibrationError(
                f"what the projections of {name} give is not finite on the calibration batches. Check the data, or "
                "lower the learning rate."
            )
        return ProjectedEntries(*self._steps)

    @property
    def is_empty(self) -> bool:
        return not self._steps


@torch.no_grad()
def sample_projections(
    model: nn.Module,
    layers: Sequence[NarrowableLayer],
    batches: Sequence[Any],
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> Mapping[str, ProjectedEntries]:
    """
    Run a model over batches and sample what some of its layers project; up to 32 MB a layer, on the CPU.

    Args:
        model (`torch.nn.Module`): The model. It runs in evaluation mode and without a gradient.
        layers (`Sequence[NarrowableLayer]`): Layers of it, mixed or not.
        batches (`Sequence`): Inputs of the model.
        loss_function (`Callable`, *optional*): Knows how the model takes a batch; the batch is given as it is when
            unset.
        seed (`int`, *optional*, defaults to 0): Draws the steps.

    Returns:
        `dict[str, ProjectedEntries]`: By the layer's name; layers that did not run are missing.

    Raises:
        [`~errors.CalibrationError`]: an entry is not finite.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    samplers = {layer.name: _Sampler(generator) for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for layer in layers:
            stack.enter_context(layer.projections_shown(samplers[layer.name].show))
        for batch in batches:
            (loss_function or _run)(model, move_to_device(batch, device))
    return {name: sampler.result(name) for name, sampler in samplers.items() if not sampler.is_empty}
