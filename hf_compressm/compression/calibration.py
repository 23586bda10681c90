"""The data pass: batches in, the Gramians of every state-space layer out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..architectures import StateSpaceLayer, SumOverProcesses
from ..errors import CalibrationError
from .gramians import ClosedFormGramians, LayerGramians
from .observers import LOSS_SCALE, make_observer


def _uncompiled() -> AbstractContextManager[Any]:
    """A compiled forward pass would go past the scan that is watched, and be compiled again for evaluation mode."""
    # Loading the compiler takes seconds, and without it nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# What torch's cross entropy and transformers' collators leave out of the mean.
_IGNORED_LABEL = -100

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch; returns the scalar loss."""


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


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """
    The loss that a Hugging Face model returns for a batch.

    Args:
        model (`torch.nn.Module`): Returns an output with `loss`, or a tuple that begins with a scalar loss.
        batch (`Mapping` or positional input): Keyword arguments of the model (a mapping), or its only argument.

    Raises:
        [`~errors.CalibrationError`]: the model returned no loss, as it does for a batch without labels.
    """
    loss = _loss_in(_run(model, batch))
    if loss is None:
        keys = f" (it has {', '.join(map(str, batch))})" if isinstance(batch, Mapping) else ""
        raise CalibrationError(
            f"{type(model).__name__} returned no scalar loss for a calibration batch{keys}. Add `labels` to the batch, "
            "give a `loss_function(model, batch)`, or set gramians='white_noise', which needs no loss."
        )
    return loss


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
    time-invariant needs no batch: their Gramians are known in closed form, and batches only give the loss. Weights,
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
    observers = [make_observer(gramians, generator, trigger) for _ in selective]
    needs_gradient = any(observer.needs_loss_gradient for observer in observers)
    total = sum_over_processes or (lambda tensor: tensor)

    losses = []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for layer, observer in zip(selective, observers):
            stack.enter_context(layer.observed(observer))
        disable = None if progress is None else not progress
        for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=disable):
            batch = move_to_device(batch, device)
            with torch.set_grad_enabled(needs_gradient):
                if needs_gradient or loss_function is not None:
                    loss = (loss_function or model_loss)(model, batch)
                else:
                    loss = _loss_in(_run(model, batch))
            terms = loss_terms(batch)
            losses.append(None if loss is None else (_finite(loss), terms))
            if needs_gradient and loss.requires_grad:
                for observer in observers:
                    observer.loss_terms = terms
                with torch.enable_grad():
                    torch.autograd.grad(LOSS_SCALE * loss, trigger, allow_unused=True)
    if selective and not losses:
        raise CalibrationError(
            f"there is no calibration batch; {selective[0].name} ({selective[0].family}) is a selective layer, whose "
            "Gramians are measured on data. Give at least one batch."
        )
    measured = {layer.name: observer.result(layer.name, total) for layer, observer in zip(selective, observers)}
    results = {
        name: measured[name] if system is None else ClosedFormGramians(system) for name, system in systems.items()
    }
    return Calibration(results, _mean_over_processes(losses, total, device))


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Any],
    loss_function: LossFunction | None = None,
    sum_over_processes: SumOverProcesses | None = None,
) -> float:
    """
    Mean loss of the batches, as [`calibrate`] measures it: in evaluation mode and without a gradient.

    Args:
        model (`torch.nn.Module`): The model.
        batches (`Iterable`): Inputs of the model on any device.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        sum_over_processes (`Callable`, *optional*): Adds a tensor over all processes.

    Raises:
        [`~errors.CalibrationError`]: a batch gives no loss. A loss that is not finite is returned as it is.
    """
    device = next(model.parameters()).device
    with evaluation_mode(model):
        losses = [
            (float((loss_function or model_loss)(model, move_to_device(batch, device)).detach()), loss_terms(batch))
            for batch in batches
        ]
    return _mean_over_processes(losses, sum_over_processes or (lambda tensor: tensor), device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, no recurrent cache, and the random state of torch put back at the end."""
    training = {module: module.training for module in model.modules()}
    cached = [
        config
        for config in {
            id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None
        }.values()
        if getattr(config, "use_cache", False) is True
    ]
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _uncompiled():
        try:
            model.eval()
            for config in cached:
                config.use_cache = False
            yield
        finally:
            for config in cached:
                config.use_cache = True
            for module, mode in training.items():
                module.training = mode


def loss_terms(batch: Any) -> int:
    """
    How many terms a mean loss over the batch has, so that batches of unequal size weigh by what is in them.

    That is the number of labels that are not ignored (-100), or, without labels, the number of examples.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return max(1, int((labels != _IGNORED_LABEL).sum()))
    tensors = [value for value in _tensors_in(batch) if value.ndim]
    return tensors[0].shape[0] if tensors else 1


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors_in(value)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device; other entries are kept as they are."""
    if isinstance(batch, Tensor):
        # What was made in inference mode cannot take part in a backward pass.
        return batch.clone().to(device) if batch.is_inference() else batch.to(device)
    if isinstance(batch, Mapping):
        return {name: move_to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [move_to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


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


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _loss_in(outputs: Any) -> Tensor | None:
    """The scalar loss in a model's outputs, if there is one."""
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, tuple) and outputs:
        loss = outputs[0]
    else:
        loss = getattr(outputs, "loss", outputs)
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _mean_over_processes(
    losses: Sequence[tuple[float, int] | None], total: SumOverProcesses, device: torch.device
) -> float | None:
    """The mean loss of all batches, or None where a process has none; every process has to come here."""
    known = [loss for loss in losses if loss is not None]
    weighted, terms = sum(loss * terms for loss, terms in known), float(sum(terms for _, terms in known))
    unknown = float(not losses or None in losses)
    sums = total(torch.tensor([weighted, terms, unknown], dtype=torch.float64, device=device))
    return None if sums[2] else float(sums[0] / sums[1])
