"""The data pass: batches in, the Gramians of every state-space layer out."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import ScanObserver, StateSpaceLayer, SumOverProcesses
from ...errors import CalibrationError, ConfigurationError
from ...systems import DiagonalLTI
from ..progress_bar import with_progress
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
from .reach import reached_everywhere, watched_reach
from .state_bytes import StateBytesObserver, state_bytes_of
from .system_observer import SystemObserver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """
    The outcome of a calibration pass.

    Args:
        gramians (`dict[str, LayerGramians]`): The Gramians of each layer, by the layer's name.
        loss (`float`, *optional*): Mean loss of the batches; unset where there is none and none was needed.
        left_out (`frozenset[int]`): Places of the batches whose loss is NaN; they count for nothing.
        unreached (`dict[str, str]`): Why a layer's Gramians are unknown, by the name of each such layer.
        state_bytes (`dict[str, int]`): Memory of the recurrent state of one sequence in each layer, by name; None for
            a selective layer that was never run.
    """

    gramians: dict[str, LayerGramians]
    loss: float | None
    left_out: frozenset[int] = frozenset()
    unreached: dict[str, str] = field(default_factory=dict)
    state_bytes: dict[str, int | None] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    layers: Sequence[StateSpaceLayer],
    batches: Iterable[Any],
    gramians: str = "loss_gradient",
    fit_readout: bool = False,
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
        fit_readout (`bool`, *optional*, defaults to `False`): Keep sampled steps of selective layers, to fit the
            readouts of truncations to; 32 MB a layer at most.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        sum_over_processes (`Callable`, *optional*): Adds a tensor over all processes.
        seed (`int`, *optional*, defaults to 0): Seed of the sampled time steps and probes.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Raises:
        [`~errors.CalibrationError`]: there is no batch, a batch gives no loss or an infinite one, the loss of all
            batches is NaN, no layer was reached, or a layer's Gramians are not finite.
    """
    device, total = next(model.parameters()).device, sum_over_processes or (lambda tensor: tensor)
    systems = {layer.name: layer.system() for layer in layers}
    trigger = torch.zeros((), device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    observers = _observers(layers, systems, gramians, generator, trigger, fit_readout)
    measuring = {name: StateBytesObserver(known) for name, known in observers.items() if systems[name] is None}
    losses: list[tuple[float, int] | None] = []
    with evaluation_mode(model), _watched(layers, {**observers, **measuring}) as idle:
        one_batch = _BatchPass(model, list(observers.values()), trigger, loss_function, gramians == "loss_gradient")
        for batch in with_progress(batches, "calibrating", "batch", progress):
            losses.append(one_batch(move_to_device(batch, device)))
    _require_batches(layers, systems, losses)
    left_out = _left_out(losses)
    missing = {**{name: observer.unreached() for name, observer in observers.items()}, **dict.fromkeys(idle, "run")}
    unreached = reached_everywhere([layer.name for layer in layers], missing if losses else {}, total)
    results = {
        name: (observers[name].result(name, total) if name in observers else ClosedFormGramians(system)).on_cpu()
        for name, system in systems.items()
        if name not in unreached
    }
    mean = _mean_over_processes([x for n, x in enumerate(losses) if n not in left_out], total, device)
    state_bytes = {layer.name: state_bytes_of(layer, measuring.get(layer.name)) for layer in layers}
    return Calibration(results, mean, left_out, unreached, state_bytes)


@contextmanager
def _watched(layers: Sequence[StateSpaceLayer], observers: dict[str, ScanObserver]) -> Iterator[Collection[str]]:
    """Let the observers see their layers; yields the names of those without an observer that have not run so far."""
    with ExitStack() as stack:
        for layer in layers:
            if layer.name in observers:
                stack.enter_context(layer.observed(observers[layer.name]))
        yield stack.enter_context(watched_reach([layer for layer in layers if layer.name not in observers]))


def _observers(
    layers: Sequence[StateSpaceLayer],
    systems: dict[str, DiagonalLTI | None],
    gramians: str,
    generator: torch.Generator,
    trigger: Tensor,
    fit_readout: bool,
) -> dict[str, GramianObserver]:
    """An observer for each layer that the data reach, by the layer's name."""
    observers: dict[str, GramianObserver] = {}
    for layer in layers:
        system = systems[layer.name]
        if system is None:
            if gramians in ("input_weighted", "closed_form"):
                raise ConfigurationError(
                    f"gramians is {gramians!r}, which asks for a closed form; {layer.name} ({layer.family}) is a "
                    "selective layer and has none. Choose 'loss_gradient', 'white_noise' or 'averaged'."
                )
            observers[layer.name] = make_observer(gramians, generator, trigger, fit_readout)
        elif gramians in ("loss_gradient", "input_weighted"):
            observers[layer.name] = SystemObserver(system, generator, trigger if gramians == "loss_gradient" else None)
    return observers


def _require_batches(
    layers: Sequence[StateSpaceLayer], systems: dict[str, DiagonalLTI | None], losses: Sequence[Any]
) -> None:
    selective = [layer for layer in layers if systems[layer.name] is None]
    if selective and not losses:
        raise CalibrationError(
            f"there is no calibration batch; {selective[0].name} ({selective[0].family}) is a selective layer, whose "
            "Gramians are measured on data. Give at least one batch."
        )


@dataclass(frozen=True)
class _BatchPass:
    """One batch through the model, and its gradient back where an observer makes use of it."""

    model: nn.Module
    observers: Sequence[GramianObserver]
    trigger: Tensor
    loss_function: LossFunction | None
    wants_gradient: bool

    def __call__(self, batch: Any) -> tuple[float, int] | None:
        """The loss and how many terms it has; NaN is returned, and nothing that the batch showed is kept then."""
        needs_loss = any(observer.needs_loss_gradient for observer in self.observers)
        # A time-invariant layer makes use of a loss where there is one.
        needs_gradient = needs_loss or (self.wants_gradient and bool(self.observers))
        sums = [observer.sums() for observer in self.observers]
        # Before the loss function has the batch, which may take entries out of it.
        terms = loss_terms(batch)
        with torch.set_grad_enabled(needs_gradient):
            if needs_loss or self.loss_function is not None:
                loss = (self.loss_function or model_loss)(self.model, batch)
            else:
                loss = _loss_in(_run(self.model, batch))
        if loss is None:
            return None
        value = _number(loss)
        if math.isnan(value):
            # What needs no loss is known of the batch all the same.
            for observer, before in zip(self.observers, sums) if needs_gradient else ():
                observer.go_back_to(before)
        elif needs_gradient and loss.requires_grad:
            self._propagate_back(loss, terms)
        return value, terms

    def _propagate_back(self, loss: Tensor, terms: int) -> None:
        for observer in self.observers:
            observer.loss_terms = terms
        with torch.enable_grad():
            torch.autograd.grad(LOSS_SCALE * loss, self.trigger, allow_unused=True)
        for observer in self.observers:
            observer.loss_terms = None


def _left_out(losses: Sequence[tuple[float, int] | None]) -> frozenset[int]:
    """The places of batches whose loss is NaN, which may be some, but not all."""
    left_out = frozenset(number for number, loss in enumerate(losses) if loss is not None and math.isnan(loss[0]))
    if not left_out:
        return left_out
    if len(left_out) == len(losses):
        raise CalibrationError(
            "the calibration loss is nan; a cut cannot be judged on it. Check the data (are all labels -100?) and the "
            "learning rate."
        )
    logger.warning(
        "%d of %d calibration batches are left out, as their loss is NaN (all their labels may be -100).",
        len(left_out),
        len(losses),
    )
    return left_out


def _number(loss: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise CalibrationError(f"the loss function returned {found}; it must return a tensor with a single number.")
    value = float(loss.detach())
    if math.isinf(value):
        raise CalibrationError(
            f"the calibration loss is {value}; a cut cannot be judged on it. Check the data and the learning rate."
        )
    return value
