"""The data pass: batches in, the Gramians of every state-space layer out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...architectures import StateSpaceLayer, SumOverProcesses
from ...errors import CalibrationError, ConfigurationError
from ...systems import DiagonalLTI
from .layer_gramians import ClosedFormGramians, LayerGramians
from .model_pass import (
    LossFunction,
    _loss_in,
    _mean_over_processes,
    _run,
    evaluation_mode,
    loss_terms,
    model_loss,
    move_to_device,
)
from .observers import LOSS_SCALE, GramianObserver, make_observer
from .system_observer import SystemObserver


@dataclass(frozen=True)
class Calibration:
    """
    The outcome of a calibration pass.

    Args:
        gramians (`dict[str, LayerGramians]`): The Gramians of each layer, by the layer's name.
        loss (`float`, *optional*): Mean loss of the batches; unset where there is none and none was needed.
    """

    gramians: dict[str, LayerGramians]
    loss: float | None


def calibrate(
    model: nn.Module,
    layers: Sequence[StateSpaceLayer],
    batches: Iterable[Any],
    gramians: str = "loss_gradient",
    loss_function: LossFunction | None = None,
    sum_over_processes: SumOverProcesses | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """
    Estimate the Gramians of all layers on a few batches.

    One forward pass a batch, and one backward pass where the loss's gradient is asked for. A model whose layers are all
    time-invariant needs no batch: without one their Gramians are those of the closed form, under white noise. Weights,
    their `.grad`, the training mode and the global random state are left as they were. Peak memory beyond that of
    the passes is the bounded buffer of [`~ops.state_gramian`] and three N x N matrices a layer. Padded positions count
    as steps at which the state decays; batches with little padding give the truest Gramians.

    Args:
        model (`torch.nn.Module`): The model that holds the layers.
        layers (`Sequence[StateSpaceLayer]`): The layers to watch, from [`~architectures.find_layers`].
        batches (`Iterable`): Inputs of the model on any device; mappings are passed as keyword arguments.
        gramians (`str`, *optional*, defaults to `"loss_gradient"`): See [`CompreSSMConfig`].
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        sum_over_processes (`Callable`, *optional*): Adds a tensor over all processes.
        seed (`int`, *optional*, defaults to 0): Seed of the sampled time steps and probes.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Raises:
        [`~errors.CalibrationError`]: there is no batch, a batch gives no loss or one that is not finite, or a layer's
            Gramians are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    trigger = torch.zeros((), device=device, requires_grad=True)
    systems = {layer.name: layer.system() for layer in layers}
    selective = [layer for layer in layers if systems[layer.name] is None]
    observers = {
        layer.name: _observer_of(layer, systems[layer.name], gramians, generator, trigger)
        for layer in layers
        if layer in selective or gramians in ("loss_gradient", "input_weighted")
    }
    needs_loss = any(observer.needs_loss_gradient for observer in observers.values())
    # A time-invariant layer makes use of a loss where there is one.
    needs_gradient = needs_loss or (bool(observers) and gramians == "loss_gradient")
    total = sum_over_processes or (lambda tensor: tensor)

    losses = []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for layer in layers:
            if layer.name in observers:
                stack.enter_context(layer.observed(observers[layer.name]))
        disable = None if progress is None else not progress
        for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=disable):
            batch = move_to_device(batch, device)
            with torch.set_grad_enabled(needs_gradient):
                if needs_loss or loss_function is not None:
                    loss = (loss_function or model_loss)(model, batch)
                else:
                    loss = _loss_in(_run(model, batch))
            terms = loss_terms(batch)
            losses.append(None if loss is None else (_finite(loss), terms))
            if needs_gradient and loss is not None and loss.requires_grad:
                for observer in observers.values():
                    observer.loss_terms = terms
                with torch.enable_grad():
                    torch.autograd.grad(LOSS_SCALE * loss, trigger, allow_unused=True)
                for observer in observers.values():
                    observer.loss_terms = None
    if selective and not losses:
        raise CalibrationError(
            f"there is no calibration batch; {selective[0].name} ({selective[0].family}) is a selective layer, whose "
            "Gramians are measured on data. Give at least one batch."
        )
    measured = {name: observer.result(name, total) for name, observer in observers.items()}
    results = {
        name: measured[name] if name in measured else ClosedFormGramians(system) for name, system in systems.items()
    }
    return Calibration(results, _mean_over_processes(losses, total, device))


def _observer_of(
    layer: StateSpaceLayer, system: DiagonalLTI | None, gramians: str, generator: torch.Generator, trigger: Tensor
) -> GramianObserver:
    if system is not None:
        return SystemObserver(system, generator, trigger if gramians == "loss_gradient" else None)
    if gramians in ("input_weighted", "closed_form"):
        raise ConfigurationError(
            f"gramians is {gramians!r}, which asks for a closed form; {layer.name} ({layer.family}) is a selective "
            "layer and has none. Choose 'loss_gradient', 'white_noise' or 'averaged'."
        )
    return make_observer(gramians, generator, trigger)


def _finite(loss: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise CalibrationError(f"the loss function returned {found}; it must return a tensor with a single number.")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise CalibrationError(
            f"the calibration loss is {value}; a cut cannot be judged on it. Check the data and the learning rate."
        )
    return value
