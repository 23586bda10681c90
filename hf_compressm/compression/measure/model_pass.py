"""One pass of a model over batches: its loss, in evaluation mode, with nothing of it left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ...architectures.contract import SumOverProcesses
from ...errors import CalibrationError


def _uncompiled() -> AbstractContextManager[Any]:
    """A compiled forward pass would go past the scan that is watched, and be compiled again for evaluation mode."""
    # Loading the compiler takes seconds, and without it nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _RunAsItIs:
    """Stands in for torch's reentrant checkpoint: the function, with its graph kept."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    # The reentrant form hides what it runs from torch.autograd.grad.
    stock = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _RunAsItIs
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = stock


# What torch's cross entropy and transformers' collators leave out of the mean.
_IGNORED_LABEL = -100


LossFunction = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch; returns the scalar loss."""


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
    with torch.random.fork_rng(devices=devices), _uncompiled(), _without_reentrant_checkpoints():
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


def says_nothing(batch: Any) -> bool:
    """Whether all labels of a batch are ignored (-100), also where the first of each row has no token before it."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return False
    predicted = labels[:, 1:] if labels.ndim == 2 and labels.shape[1] > 1 else labels
    return bool((predicted == _IGNORED_LABEL).all())


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
