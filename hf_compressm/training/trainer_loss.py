"""The loss as the Trainer takes it: its `compute_loss`, where that is more than the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..compression import LossFunction
from ..compression.measure.model_pass import evaluation_mode, model_loss, move_to_device
from ..compression.processes import Processes
from ..errors import ConfigurationError


def trainer_loss(trainers: Iterable[Trainer]) -> LossFunction | None:
    """
    The loss of a Trainer, or None where it is what the model returns.

    That is `Trainer.compute_loss` where a subclass has its own, where `compute_loss_func` is given, or where labels are
    smoothed. It gets a copy of the batch, which it may take entries out of, and the number of items in it.

    Args:
        trainers (`Iterable[transformers.Trainer]`): The Trainer, or several; the first with such a loss counts.
    """
    for trainer in trainers:
        own = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
        if own or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            return _loss_of(trainer)
    return None


def _loss_of(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    def loss_function(model: nn.Module, batch: Any) -> Tensor:
        # Private API of transformers.
        inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, num_items_in_batch=_items(trainer, inputs))

    return loss_function


def _items(trainer: Trainer, inputs: Any) -> Tensor | None:
    """What `Trainer.get_batch_samples` counts, without its exchange between processes."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return None
    # Private API of transformers.
    counted = labels[..., 1:] if getattr(trainer, "_loss_shifts_labels", False) else labels
    items = inputs.get("shift_labels", counted).ne(-100).sum()
    # The Trainer multiplies such a loss by the number of processes.
    return items * trainer.args.world_size if trainer.args.average_tokens_across_devices else items


def require_loss(
    model: nn.Module, batch: Any, loss_function: LossFunction | None, needed: bool, processes: Processes
) -> None:
    """
    Take the loss of one batch before the training, so that what cannot work is said there.

    Args:
        model (`torch.nn.Module`): The model.
        batch (`object`): An input of the checks; nothing is tried where it is None.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss.
        needed (`bool`): Whether the checks need a loss.
        processes ([`~compression.processes.Processes`]): All of them come here.

    Raises:
        [`~errors.ConfigurationError`]: there is no loss.
    """
    try:
        if needed and batch is not None:
            with evaluation_mode(model), torch.no_grad():
                loss = (loss_function or model_loss)(model, move_to_device(batch, next(model.parameters()).device))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"the loss is a {type(loss).__name__} and not a tensor with a single number")
    except Exception as error:
        processes.failed(error)
        raise ConfigurationError(
            f"the loss of a calibration batch cannot be taken, so that no check could be made: "
            f"{type(error).__name__}: {error}. Give CompreSSMCallback a loss_function(model, batch), or "
            "calibration_batches that the loss is made for."
        ) from error
    processes.agree("the loss of a calibration batch", {})
