"""One training run with the plain Trainer, and what it cost."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_compressm.ops import compile_kernels
from hf_compressm.training import state_space_parameter_groups

from .cost import Cost, Stopwatch
from .data import SequenceData
from .metrics import classification_metrics
from .settings import TrainingSettings


def train(
    model: PreTrainedModel,
    data: SequenceData,
    settings: TrainingSettings,
    seed: int,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    trainer_class: type[Trainer] = Trainer,
    **trainer_arguments: Any,
) -> Cost:
    """
    Train a model in place.

    Args:
        model (`PreTrainedModel`): A classifier.
        data ([`SequenceData`]): The task.
        settings ([`TrainingSettings`]): Steps, batch, learning rates.
        seed (`int`): Of the order of the data and of dropout.
        output_dir (`Path`): For what callbacks write.
        callbacks (`Sequence`, *optional*): For the Trainer.
        trainer_class (`type`, *optional*): The Trainer, or a method's subclass of it.
        trainer_arguments: Further arguments of that class.

    Returns:
        [`Cost`]: Of the training alone, without the test.
    """
    groups = state_space_parameter_groups(
        model, settings.learning_rate, settings.weight_decay, settings.state_space_lr_factor
    )
    trainer = trainer_class(
        model=model,
        args=_arguments(settings, seed, output_dir),
        train_dataset=data.train,
        data_collator=data.collator,
        optimizers=(torch.optim.AdamW(groups, lr=settings.learning_rate), None),
        callbacks=list(callbacks),
        **trainer_arguments,
    )
    _quiet(trainer)
    _warm_up(trainer)
    stopwatch = Stopwatch()
    with stopwatch:
        trainer.train()
    return stopwatch.cost


def test_accuracy(model: PreTrainedModel, data: SequenceData, settings: TrainingSettings, output_dir: Path) -> float:
    """
    Accuracy on the test set.

    Args:
        model (`PreTrainedModel`): A classifier.
        data ([`SequenceData`]): The task.
        settings ([`TrainingSettings`]): Its `eval_batch_size` is used.
        output_dir (`Path`): The Trainer wants one.
    """
    trainer = Trainer(
        model=model,
        args=_arguments(settings, 0, output_dir),
        eval_dataset=data.test,
        data_collator=data.collator,
        compute_metrics=classification_metrics(),
    )
    _quiet(trainer)
    return float(trainer.evaluate()["eval_accuracy"])


def _quiet(trainer: Trainer) -> None:
    """Off a terminal, where there are no progress bars, a grid's lines are not buried under every run's losses."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)


def _warm_up(trainer: Trainer) -> None:
    """Compile kernels and make one step of a copy, so that the first run in a process is not charged for that."""
    if trainer.args.device.type == "cpu":
        compile_kernels()
    model = copy.deepcopy(trainer.model)
    rows = [trainer.train_dataset[index] for index in range(min(4, len(trainer.train_dataset)))]
    batch = {name: tensor.to(model.device) for name, tensor in trainer.data_collator(rows).items()}
    with torch.random.fork_rng():
        model.train()(**batch).loss.backward()


# pytest collects what begins with "test_".
test_accuracy.__test__ = False


def seeded(seed: int) -> None:
    """Set every random state, so that a model that is built next is the same in every method."""
    set_seed(seed)


def _arguments(settings: TrainingSettings, seed: int, output_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * settings.max_steps),
        lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=max(1, settings.max_steps // 10),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the collator reads columns that no model knows
        disable_tqdm=not sys.stderr.isatty(),
        seed=seed,
        data_seed=seed,
    )
