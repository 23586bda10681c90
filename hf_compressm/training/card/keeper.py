"""The model card in a training run: written with every save and push, and into the card that the Trainer writes."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...cards import Provenance, merge_trainer_card, render_card, verdict
from ...compression import LAYERS_NAME, CheckRecord
from ...config import CompreSSMConfig
from ...errors import CardError
from ...files import checkpoint_folder, checkpoint_step
from ...saving import (
    describe,
    follow_saves,
    holds_adapter,
    own_class,
    read_card,
    require_one_model,
    write_card,
    write_model_files,
)
from ..trackers import log_line
from ..trainer_lookup import find_trainers
from .evaluations import evaluations
from .step_clock import StepClock

logger = logging.getLogger(__name__)


class _Compressing(Protocol):
    """What this file needs of the callback that cuts."""

    config: CompreSSMConfig

    @property
    def records(self) -> list[CheckRecord]:
        """Every check so far."""
        ...

    @property
    def returned_to(self) -> int | None:
        """The step of the best checkpoint, where the run went back past a cut to it."""
        ...

    @property
    def is_paused(self) -> bool:
        """Whether the training only paused for a check."""
        ...

    def saving_checkpoint(self) -> None:
        """What has to be done before a checkpoint is written."""
        ...

    def checkpoint_saved(self, folder: Path) -> None:
        """Add to a checkpoint what the Trainer does not write."""
        ...


def keep_card(owner: TrainerCallback) -> None:
    """
    Have a callback's Trainer write the model card of a compression with everything that it saves or pushes.

    To be called in an event of the callback; asking again changes nothing.

    Args:
        owner ([`CompreSSMCallback`]): The callback that cuts; its settings and records fill the card.
    """
    for trainer in find_trainers(owner):
        held = trainer.callback_handler.callbacks
        if not any(isinstance(callback, CardKeeper) and callback.owner is owner for callback in held):
            trainer.add_callback(CardKeeper(owner, trainer))


class CardKeeper(TrainerCallback):
    """
    Keeps the facts of a compressing run up to date and hands them to everything that is saved or pushed.

    Two methods of the Trainer give callbacks no say: `save_model` calls none, and `create_model_card` overwrites
    README.md after `on_push_begin`. Both are shadowed on this one Trainer.

    Args:
        owner ([`CompreSSMCallback`]): The callback that cuts.
        trainer (`transformers.Trainer`): The Trainer that holds it.
    """

    def __init__(self, owner: _Compressing, trainer: Trainer) -> None:
        self.owner = owner
        self._trainer = trainer
        self._clock = StepClock()
        self._changes_pushed = 0
        # Private API of transformers.
        trainer.save_model = self._shadowed(trainer.save_model, self._saving)
        trainer.create_model_card = self._shadowed(trainer.create_model_card, self._writing_a_card)

    def provenance(self) -> Provenance:
        """The facts as they are now."""
        trainer, records = self._trainer, self.owner.records
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        facts = Provenance(
            records=records,
            config=self.owner.config,
            calibration_data="batches of the training data",
            evaluations=evaluations(
                trainer.state.log_history,
                records,
                _dataset_name(dataset) or "the evaluation set",
                best=self.owner.returned_to,
            ),
            step_seconds=self._clock.before_and_after(),
            name=getattr(trainer, "hub_model_id", None),
        )
        return describe(self._model, facts)

    @property
    def _model(self) -> nn.Module:
        """The model whose `save_pretrained` the Trainer calls: inside a compiled one, the plain one."""
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        self._clock.tick(cuts=sum(record.outcome == "cut" for record in self.owner.records))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is no part of a training step."""
        self._clock.pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is a save."""
        self._clock.pause()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """From now on the model can be saved without the Trainer; one line says what the training came to."""
        facts = self.provenance()
        follow_saves(self._model, facts)
        line = None if self.owner.is_paused else verdict(facts)
        if line is not None:
            log_line(line, args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """
        Put card, history, picture and a custom model's code where the Trainer pushes from.

        Raises:
            [`~errors.InconsistentModelError`]: the checkpoint that would be pushed is not one model.
        """
        if not state.is_world_process_zero:
            return
        self._let_upload_finish()
        checkpoint = checkpoint_folder(args.output_dir, state.global_step)
        if (checkpoint / "config.json").is_file():
            require_one_model(checkpoint, own_class(model))
            # The Trainer pushes the checkpoint's weights and configuration, but not the code that they name.
            for code in checkpoint.glob("*.py"):
                shutil.copyfile(code, Path(args.output_dir) / code.name)
        if (checkpoint / LAYERS_NAME).is_file():
            shutil.copyfile(checkpoint / LAYERS_NAME, Path(args.output_dir) / LAYERS_NAME)
        self._write_files(args.output_dir, is_adapter=holds_adapter(checkpoint))

    def _let_upload_finish(self) -> None:
        """
        Where a cut was made since the last push, wait until that is done.

        The Trainer uploads in the background from the folder that it is about to overwrite; a revision with the
        configuration of one size and the weights of another could not be loaded.
        """
        cuts = sum(record.outcome in ("cut", "rolled_back") for record in self.owner.records)
        running = getattr(self._trainer, "push_in_progress", None)
        if cuts != self._changes_pushed and running is not None:
            running.wait_until_done()
        self._changes_pushed = cuts

    def _shadowed(self, stock: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            return around(stock, *args, **kwargs)

        return shadow

    def _saving(self, stock: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        folder = Path(output_dir or trainer.args.output_dir)
        is_checkpoint = checkpoint_step(folder) is not None
        # Private API of transformers.
        if is_checkpoint and (kwargs.get("_internal_call") or any(args)):
            # By the Trainer, in all processes; another call may come from one of them alone.
            self.owner.saving_checkpoint()
        follow_saves(self._model, self.provenance())
        result = stock(output_dir, *args, **kwargs)
        if is_checkpoint and trainer.args.should_save and folder.is_dir():
            self.owner.checkpoint_saved(folder)
        # A module of the user's own has no save_pretrained that could carry the facts.
        if trainer.args.should_save and not hasattr(self._model, "save_pretrained"):
            self._write_files(folder)
        return result

    def _writing_a_card(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trainer, folder = self._trainer, self._trainer.args.output_dir
        if not trainer.is_world_process_zero():
            return stock(*args, **kwargs)
        existing = read_card(folder)
        result = stock(*args, **kwargs)
        provenance = self.provenance()
        if provenance.layers():
            try:
                name = provenance.name or Path(folder).absolute().name
                provenance = replace(provenance, name=name, is_adapter=holds_adapter(folder))
                write_card(folder, merge_trainer_card(existing, read_card(folder), render_card(provenance)))
            except CardError as error:
                write_card(folder, existing)
                logger.warning("the model card in %s was left as it is: %s", folder, error)
        if os.path.isfile(os.path.join(folder, "config.json")):
            require_one_model(folder, own_class(self._model), provenance.sizes())
        return result

    def _write_files(self, folder: str | os.PathLike, is_adapter: bool = False) -> None:
        if not os.path.isdir(folder):
            return
        try:
            facts = self.provenance()
            name = facts.name or Path(folder).absolute().name
            write_model_files(folder, replace(facts, name=name, is_adapter=is_adapter))
        except CardError as error:
            logger.warning("the model card in %s was left as it is: %s", folder, error)


def _dataset_name(dataset: Any) -> str | None:
    """The name by which a `datasets.Dataset` was loaded, or None."""
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or None
