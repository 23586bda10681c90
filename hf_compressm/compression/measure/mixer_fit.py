"""What writes and reads the states of selective layers after a cut, fitted to what the layers gave before it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import StateSpaceLayer
from ...systems import descend, inverse_root
from ..processes import Processes
from ..progress_bar import with_progress
from .entry_moments import EntryMoments
from .mixer_error import Call, MixerError, Wanted, precision_of, states_are_last, tensor_of
from .model_pass import LossFunction, _loss_in, _run, evaluate_loss, evaluation_mode, move_to_device
from .output_samples import held_out_steps

logger = logging.getLogger(__name__)

# Of all batches together: so many steps are run again for every step of the descent.
_STEPS = 2**15
# Outputs of one layer that are kept, over all batches: 64 MB in single precision.
_OUTPUTS = 2**24


class MixerFit:
    r"""
    Fits the matrices of selective layers that write to their state and read it, one layer behind the other.

    Each layer's module is given the inputs that it gets in the cut model, and should give what it gave before the cut.
    An error of its output counts by the root of the mean square of the loss's gradient there, so that steps on which
    the loss depends count more, and no few of them alone; without a loss all count alike. What is fitted are mixing
    matrices, or the rows of B and C of a projection that the cut was folded into; everything else stays.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers in the order in which they run; others than selective ones, and
            those that only keep some of their states, are left alone.
        model (`torch.nn.Module`): The model that holds them. It runs in evaluation mode.
        batches (`Sequence`): Inputs of the model.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        seed (`int`): Draws the sequences.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.
    """

    def __init__(
        self,
        layers: Sequence[StateSpaceLayer],
        model: nn.Module,
        batches: Sequence[Any],
        loss_function: LossFunction | None,
        processes: Processes,
        seed: int,
        progress: bool | None = None,
    ) -> None:
        self._layers = [layer for layer in layers if layer.fitted_parameters()]
        self._model = model
        self._batches = batches
        self._loss_function = loss_function
        self._processes = processes
        self._progress = progress
        self._generator = torch.Generator().manual_seed(seed)
        self._wanted: dict[str, list[Wanted]] | None = None
        self._roots: dict[str, dict[str, Tensor | None]] = {}
        self._uncut_loss: float | None = None

    def remember_outputs(self) -> None:
        """Keep what the layers give, before anything is cut; once is enough. Costs a training step a batch."""
        if self._wanted is not None:
            return
        self._wanted = {layer.name: [] for layer in self._layers}
        if not self._layers:
            return
        moments, missing = EntryMoments(self._layers), 0.0
        for batch in self._batches:
            missing += not self._remember(batch, moments)
        # Every process has to know the same of all batches.
        if not float(self._processes.sum(torch.tensor(missing, dtype=torch.float64))):
            self._uncut_loss = self._loss()
        for layer in self._layers:
            self._roots[layer.name] = {}
            for path, entries in layer.fitted_parameters().items():
                moment = moments.of(layer.name, entries)
                moment = None if moment is None else self._processes.sum(moment)
                root = None if moment is None else self._processes.first(inverse_root(moment))
                held = _present(layer).get(path)
                if root is not None and held is not None and states_are_last(layer.layout.by_name[path]):
                    # The scan of a layer that mixes states already shows what its matrix makes of the entries.
                    root = held.detach().to(root) @ root
                self._roots[layer.name][path] = root

    def fit(self, names: Collection[str]) -> set[str]:
        """
        Give layers of the cut model the matrices whose outputs are nearest to the remembered ones.

        A layer stays as it is where it did not run, ran another number of times than before, or where no fit is better
        on held-out steps. All stay where the calibration loss rises and is further from that of the uncut model.

        Args:
            names (`Collection[str]`): The layers that were cut and may be fitted, the same in every process.

        Returns:
            `set[str]`: The layers whose matrices are others now.

        Raises:
            [`~errors.OtherProcessError`]: another process has failed.
        """
        chosen = [layer for layer in self._layers if layer.name in names and _present(layer)]
        if not chosen:
            return set()
        before = {p: p.detach().clone() for layer in chosen for p in _present(layer).values()}
        known = self._uncut_loss is not None
        loss = self._loss() if known else 0.0
        shown = with_progress(chosen, "fitting", "layer", self._progress)
        fitted = {layer.name for layer in shown if self._fit(layer)}
        if known and fitted and not self._is_nearer(self._loss(), loss):
            logger.info("nothing is fitted: the calibration loss would be higher")
            with torch.no_grad():
                for parameter, values in before.items():
                    parameter.copy_(values)
            return set()
        return fitted

    def _is_nearer(self, loss: float, before: float) -> bool:
        return loss <= before or abs(loss - self._uncut_loss) <= abs(before - self._uncut_loss)

    def _loss(self) -> float:
        return evaluate_loss(self._model, self._batches, self._loss_function, self._processes.sum)

    def _fit(self, layer: StateSpaceLayer) -> bool:
        parameters = _present(layer)
        with evaluation_mode(self._model):
            judge = MixerError(layer, parameters, self._calls(layer), self._processes)
            roots = [_fitting(self._roots[layer.name][path], M) for path, M in zip(parameters, judge.start)]
            found = self._processes.first(descend(judge, judge.start, roots))
        if all(torch.equal(new.to(old), old) for new, old in zip(found, judge.start)):
            return False
        with torch.no_grad():
            for parameter, values in zip(parameters.values(), judge.as_written(found)):
                parameter.copy_(values)
        return True

    def _calls(self, layer: StateSpaceLayer) -> list[Call] | None:
        """How the cut model calls the layer's module; None where that is not as often and as large as before."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = layer.module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                for batch in self._batches:
                    (self._loss_function or _run)(self._model, move_to_device(batch, _device_of(self._model)))
        finally:
            hook.remove()
        wanted = self._wanted[layer.name]
        if len(seen) != len(wanted):
            return None
        dtype = precision_of(layer.module)
        return [
            Call(*(_prepared(part, want.shape[0], want.sequences, dtype) for part in call), want)
            for call, want in zip(seen, wanted)
        ]

    def _remember(self, batch: Any, moments: EntryMoments) -> bool:
        """Keep what the layers give for one batch; returns whether there was a loss."""
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(torch.enable_grad())
            outputs = stack.enter_context(_outputs(self._layers))
            for layer in self._layers:
                stack.enter_context(layer.observed(moments.watcher(layer.name)))
            given = (self._loss_function or _run)(self._model, move_to_device(batch, _device_of(self._model)))
            loss = _loss_in(given)
            # What a checkpoint runs again in the backward pass is seen again.
            outputs = {name: list(found) for name, found in outputs.items()}
            flat = [output for found in outputs.values() for output in found]
            known = loss is not None and loss.requires_grad and bool(torch.isfinite(loss))
            gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True) if known else [None] * len(flat))
        for name, found in outputs.items():
            self._wanted[name] += [self._kept(output.detach(), next(gradients)) for output in found]
        return known

    def _kept(self, output: Tensor, gradient: Tensor | None) -> Wanted:
        batch, length, width = output.shape
        share = len(self._batches) * length
        count = max(1, min(batch, _STEPS // max(1, share), _OUTPUTS // max(1, share * width)))
        sequences = torch.randperm(batch, generator=self._generator)[:count]
        held_out = held_out_steps(count, length, self._generator)
        weight = torch.ones(output.shape[:2], device=output.device)
        if gradient is not None:
            squares = gradient.float().square().mean(-1)
            # Batches count by their steps, whatever their losses are the mean of.
            weight = 1 + (squares / squares.mean().clamp_min(torch.finfo(squares.dtype).tiny)).sqrt()
        where = sequences.to(output.device)
        parts = output[where].float(), weight[where], held_out.to(output.device)
        return Wanted(where, *parts, tuple(output.shape))


@contextmanager
def _outputs(layers: Sequence[StateSpaceLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """While the context is open, what the modules of layers give, by name, with gradients even in a frozen model."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.module.register_forward_hook(_keeper(found[layer.name]))
            stack.callback(hook.remove)
        yield found


def _keeper(kept: list[Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        tensor = tensor_of(output)
        tensor = tensor + torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)
        kept.append(tensor)
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    return keep


def _present(layer: StateSpaceLayer) -> dict[str, nn.Parameter]:
    """The parameters that can be fitted in the layer's present form, by path."""
    known = dict(layer.module.named_parameters())
    return {path: known[path] for path in layer.fitted_parameters() if path in known}


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _prepared(value: Any, batch: int, sequences: Tensor, dtype: torch.dtype) -> Any:
    """An argument with some sequences of the batch only, in the precision of the fit."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.to(dtype) if value.is_floating_point() else value
        return value[sequences.to(value.device)] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {name: _prepared(item, batch, sequences, dtype) for name, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_prepared(item, batch, sequences, dtype) for item in value)
    return value


def _fitting(root: Tensor | None, matrix: Tensor) -> Tensor | None:
    """A root in the precision of a matrix; None where a projection has lost rows since it was measured."""
    fits = root is not None and root.ndim <= matrix.ndim and root.shape[-2] == matrix.shape[-2]
    return root.to(matrix) if fits else None
