"""The readouts of time-invariant layers after a cut, fitted to what the layers gave before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures import StateSpaceLayer, SystemInputs, TimeInvariantLayer
from ...ops import double_device, sample_times
from ...systems import OutputMoments, fit_system_readout
from ..processes import Processes
from ..progress_bar import with_progress
from .model_pass import LossFunction, _run, evaluation_mode, move_to_device
from .output_samples import held_out_steps

logger = logging.getLogger(__name__)

# Outputs of one layer that are kept, over all batches: 32 MB in single precision.
_OUTPUTS = 2**23
# States of sampled steps that exist at once, in double precision: 32 MB.
_STATES = 2**21


@dataclass(frozen=True)
class _Wanted:
    """What a layer gave in one pass: sampled steps, which of them judge a fit, the outputs there, and their shape."""

    times: Tensor
    held_out: Tensor
    outputs: Tensor
    lengths: tuple[int, ...]


class ReadoutFit:
    """
    Fits the readouts of time-invariant layers, one layer behind the other in the cut model.

    Each layer is given the inputs that it gets from those before it, which are cut and fitted already, and the outputs
    that it had in the model before the cut.

    Args:
        layers (`Sequence[StateSpaceLayer]`): Layers in the order in which they run; selective ones are left out.
        model (`torch.nn.Module`): The model that holds them. It runs in evaluation mode and without a gradient.
        batches (`Sequence`): Inputs of the model.
        loss_function (`Callable`, *optional*): Knows how the model takes a batch; the batch is given as it is when
            unset.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        seed (`int`): Seed of the sampled steps.
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
        self._layers = [layer for layer in layers if isinstance(layer, TimeInvariantLayer)]
        self._model = model
        self._batches = batches
        self._loss_function = loss_function
        self._processes = processes
        self._progress = progress
        self._generator = torch.Generator().manual_seed(seed)
        self._wanted: dict[str, list[_Wanted]] | None = None

    def remember_outputs(self) -> None:
        """Keep what the layers give, before anything is cut; once is enough."""
        if self._wanted is None:
            self._wanted = {layer.name: [] for layer in self._layers}
            if self._layers:
                self._run_with({layer: partial(self._remember, layer) for layer in self._layers})

    def fit(self, names: Collection[str]) -> set[str]:
        """
        Give layers of the cut model the readouts whose outputs are nearest to the remembered ones.

        A readout stays as it is where the layer did not run, ran another number of times than before, or saw what is
        not finite, and where no fit is better on held-out steps.

        Args:
            names (`Collection[str]`): The layers that were cut and may be fitted, the same in every process.

        Returns:
            `set[str]`: The layers whose readout is another one now.

        Raises:
            [`~errors.OtherProcessError`]: another process has failed.
        """
        chosen = [layer for layer in self._layers if layer.name in names]
        return {layer.name for layer in with_progress(chosen, "fitting", "layer", self._progress) if self._fit(layer)}

    def _fit(self, layer: TimeInvariantLayer) -> bool:
        system = layer.system()
        C = system.C.to(double_device(system.C.device))
        nothing = OutputMoments.zeros(system.batch_shape, system.order, C.shape[-2], C.device)
        moments = torch.cat([part.flattened() for part in self._moments(layer, nothing)])
        moments = self._processes.sum(moments).to(C.device)
        seen, held_out = (nothing.like(part) for part in moments.chunk(2))
        if not torch.isfinite(moments).all() or not seen.features.any():
            logger.info("the readout of %s stays as its Gramians make it: there is nothing to fit it to", layer.name)
            return False
        fitted = self._processes.first(fit_system_readout(C, seen, held_out)).to(C)
        if not torch.equal(fitted, C):
            layer.write_readout(fitted)
            return True
        return False

    def _moments(self, layer: TimeInvariantLayer, nothing: OutputMoments) -> list[OutputMoments]:
        """Of the steps that are fitted, and of those held out; not finite where the passes are others than before."""
        sums, wanted = [nothing, nothing], iter(self._wanted[layer.name])
        unlike = nothing.like(torch.full_like(nothing.flattened(), torch.nan))

        def add(inputs: SystemInputs, output: Tensor) -> None:
            before = next(wanted, None)
            alike = before is not None and before.lengths == tuple(output.shape)
            parts = self._moments_of(layer, inputs, before) if alike else [unlike, unlike]
            sums[:] = [total + part for total, part in zip(sums, parts)]

        self._run_with({layer: add})
        return sums if next(wanted, None) is None else [unlike, unlike]

    def _moments_of(self, layer: TimeInvariantLayer, inputs: SystemInputs, wanted: _Wanted) -> list[OutputMoments]:
        """Of one pass: of the steps that are fitted, and of those held out."""
        count, batch = wanted.times.shape[1], len(wanted.times)
        at_once = max(1, _STATES // max(1, count * inputs.system.lam.numel()))
        found: list[OutputMoments] = []
        for sequences in torch.arange(batch).split(at_once):
            times = wanted.times[sequences]
            states = inputs.states(sequences.to(inputs.u.device), times)
            rows = sequences[:, None].to(inputs.u.device), times.to(inputs.u.device)
            skip = (inputs.u[rows] * layer.module.D.to(inputs.u.dtype)).to(states.device, torch.float64)
            outputs = wanted.outputs[sequences].to(skip) - skip
            there = torch.ones_like(times, dtype=torch.bool) if inputs.mask is None else inputs.mask[rows].cpu()
            held_out = wanted.held_out[sequences]
            parts = (there & ~held_out, there & held_out)
            new = [_moments_at(part.to(states.device), states, outputs) for part in parts]
            found = [total + part for total, part in zip(found, new)] if found else new
        return found

    def _remember(self, layer: TimeInvariantLayer, inputs: SystemInputs, output: Tensor) -> None:
        batch, length, width = output.shape
        count = max(1, min(length, _OUTPUTS // max(1, len(self._batches) * batch * width)))
        times = sample_times(batch, length, count, self._generator)
        rows = torch.arange(batch, device=output.device)[:, None], times.to(output.device)
        outputs = (output + inputs.u * layer.module.D.to(output.dtype))[rows].float()
        held_out = held_out_steps(batch, times.shape[1], self._generator)
        self._wanted[layer.name].append(_Wanted(times, held_out, outputs, tuple(output.shape)))

    def _run_with(self, watchers: Mapping[TimeInvariantLayer, Callable[[SystemInputs, Tensor], None]]) -> None:
        """Run the model over the batches while watchers see what layers get and give."""
        device = next(self._model.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(torch.no_grad())
            for layer, watcher in watchers.items():
                stack.enter_context(layer.observed(_Watcher(watcher)))
            for batch in self._batches:
                (self._loss_function or _run)(self._model, move_to_device(batch, device))


@dataclass(frozen=True)
class _Watcher:
    """Shows a scan to a function and leaves it as it is."""

    show: Callable[[SystemInputs, Tensor], None]

    def observe(self, inputs: SystemInputs, output: Tensor) -> Tensor:
        self.show(inputs, output)
        return output


def _moments_at(chosen: Tensor, states: Tensor, outputs: Tensor) -> OutputMoments:
    """The moments of some steps of `(sequences, K, ..., N)` states and `(sequences, K, H)` outputs."""
    states, outputs = states[chosen], outputs[chosen]
    if states.ndim == 2:
        return OutputMoments.of(states, outputs)
    return OutputMoments.of(states.transpose(0, 1), outputs.mT.unsqueeze(-1))
