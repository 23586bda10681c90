"""One training run under compression: what has to be remembered between the Trainer's events."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..architectures import fast_cpu_scan, unsupported_note
from ..compression import (
    HISTORY_NAME,
    LAYERS_NAME,
    CheckRecord,
    Compressor,
    LossFunction,
    PendingCut,
    Snapshot,
    drop_stale_states,
    keep_old_history,
    require_trained_layers,
    sizes_after,
    write_history,
)
from ..compression.decide.progress import makes_up, warn_if_given_up
from ..compression.processes import SingleProcess
from ..errors import ConfigurationError, UnsupportedModelError
from ..files import checkpoint_folder
from ..ops import compile_kernels
from .batches import seed_of_process, training_batches
from .best_model import records_of_best
from .checkpoints.running_mark import mark_active, mark_ended
from .data_parallel import ReducerChange, begin_with_a_new_reducer
from .distributed import processes_of_training, run_facts
from .evaluation_watch import EvaluationWatch
from .resume import SavedRun
from .schedule import check_steps
from .trackers import log_figures, log_line, send_figures, trackers_among
from .trainer_lookup import find_trainers, neighbours
from .trainer_loss import require_loss, trainer_loss

if TYPE_CHECKING:
    from .callback import CompreSSMCallback

logger = logging.getLogger(__name__)


class CompressionRun:
    """
    The checks of one `Trainer.train()`, from its first step to its last.

    Args:
        callback ([`CompreSSMCallback`]): The callback that this run belongs to, with what the user gave it.
        args, state, control, model, optimizer, train_dataloader: What the Trainer gives to `on_train_begin`.
        saved ([`~training.resume.SavedRun`]): What the checkpoint of a resumed run holds.

    Raises:
        [`~errors.UnsupportedModelError`]: the model or the kind of run cannot be compressed.
        [`~errors.ConfigurationError`]: the schedule does not fit the run.
    """

    def __init__(
        self,
        callback: CompreSSMCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
        saved: SavedRun,
    ) -> None:
        self.config = config = callback.config
        self.returned_to: int | None = None
        self.steps = check_steps(config, state.max_steps)
        self._args, self._state, self._control, self._model = args, state, control, model
        self._watch = EvaluationWatch(config, args, self.steps) if config.judged_by_evaluation else None
        # The step of a resumed run's checkpoint ended before it was saved.
        self._latest_step = state.global_step
        self._neighbours = neighbours(callback)
        self._averaged_weights = callback.averaged_weights
        if any(type(other) is type(callback) for other in self._neighbours):
            raise ConfigurationError("the Trainer has two CompreSSMCallbacks; one has to hold all settings.")
        self._trackers = trackers_among(self._neighbours)
        self._processes = processes_of_training()
        loss_function = callback.loss_function or trainer_loss(find_trainers(callback))
        self._compressor = self._new_compressor(optimizer, loss_function)
        self._resume(saved)
        _drop_stale_states(optimizer)
        self._batches = training_batches(
            model,
            train_dataloader,
            args.train_batch_size,
            self._compressor.batches_per_check,
            seed_of_process(args, config),
            given=callback.calibration_batches,
        )
        self._require_loss(loss_function)
        self._begin()

    def _new_compressor(self, optimizer: Any, loss_function: LossFunction | None) -> Compressor:
        """The compressor, of which all processes and the optimizer are known to fit."""
        alone = isinstance(self._processes, SingleProcess)
        show = self._state.is_world_process_zero and not self._args.disable_tqdm
        compressor = Compressor(
            self._model,
            self.config,
            loss_function=loss_function,
            optimizer=optimizer,
            find_copies=self._averages,
            processes=self._processes,
            followers=[] if alone else [partial(ReducerChange, self._model)],
            progress=None if show else False,
        )
        self._processes.agree("the training", run_facts(self.config, compressor.sizes))
        if not alone:
            begin_with_a_new_reducer(self._model)
        require_trained_layers(optimizer, compressor.layers)
        return compressor

    def _require_loss(self, loss_function: LossFunction | None) -> None:
        """Try the loss that the checks will take, so that what cannot work is said before the first step."""
        selective = any(layer.is_selective for layer in self._compressor.layers)
        needed = self.config.gramians == "loss_gradient" and (selective or loss_function is not None)
        batch = self._batches.sample() if needed else None
        require_loss(self._model, batch, loss_function, needed, self._processes)

    def _begin(self) -> None:
        """Mark the folder, make the kernels ready and say what will be checked."""
        # Closed at the training's end, or, where that ends by an exception, with this object.
        self._fast_scan = contextlib.ExitStack()
        self._fast_scan.enter_context(fast_cpu_scan(self.config.fast_cpu_scan))
        if self.config.fast_cpu_scan and next(self._model.parameters()).device.type == "cpu":
            compile_kernels()
        if self._args.should_save:
            mark_active(self._args.output_dir)
            if self._state.global_step == 0:
                keep_old_history(self._args.output_dir)
        sizes = ", ".join(map(str, sorted(set(self._compressor.sizes.values()))))
        steps = ", ".join(map(str, self.steps))
        layers = self._compressor.layers
        lines = [f"{len(layers)} layers with state size {sizes}; checks after the steps {steps}"]
        for line in (*lines, unsupported_note(self._model, layers)):
            if line is not None:
                log_line(line, self._args, self._state)
        self.logged()

    @property
    def records(self) -> list[CheckRecord]:
        """What every check saw and did."""
        return list(self._compressor.records)

    def pending(self) -> dict[str, Any] | None:
        """What a resumed run has to know of a cut that is still to be judged, as JSON values."""
        return None if self._watch is None else self._watch.state(self._compressor.pending)

    def step_begins(self) -> None:
        """Let a stream's batches be kept on the way to a check."""
        horizon = range(self._state.global_step + 1, self._state.global_step + 1 + self._compressor.batches_per_check)
        self._batches.arm(
            not self._compressor.is_finished and any(step in self.steps or self._makes_up(step) for step in horizon)
        )

    def step_ended(self) -> None:
        """Check where one is due, and ask for the evaluations that judge it; once a step."""
        step = self._state.global_step
        if step == self._latest_step:
            return
        self._latest_step = step
        if (step in self.steps or self._makes_up(step)) and not self._compressor.is_finished:
            self._check(step)
        if self._watch is not None and not self._compressor.is_finished:
            self._control.should_evaluate |= self._watch.wants_evaluation(step, self._compressor.pending)

    def logged(self) -> None:
        """Go on with the curves of state size and parameters in the trackers, wherever the Trainer logs."""
        sizes = self._compressor.sizes.values()
        figures = {
            "compressm/state_size": sum(sizes) / len(sizes),
            "compressm/parameters": float(sum(parameter.numel() for parameter in self._model.parameters())),
        }
        send_figures(figures, self._trackers, self._args, self._state, self._control, self._model)

    def _makes_up(self, step: int) -> bool:
        # A cut that an evaluation judges was given its time when the run began.
        return self._watch is None and makes_up(self._compressor.records, self.steps, step)

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Take a cut back where the evaluation says so."""
        if self._watch is None:
            return
        step = self._state.global_step
        verdict = self._processes.first(self._watch.evaluated(metrics, step, self._compressor.pending))
        if verdict is None:
            return
        if verdict.accepted:
            self._compressor.accept()
        else:
            self._keep([self._compressor.take_back(verdict.reason, step=step)])

    def saving_checkpoint(self) -> None:
        """Make a check that is due before its step is saved, where the save comes from before this callback's turn."""
        self.step_ended()

    def checkpoint_saved(self, folder: Path) -> None:
        """
        Add to a checkpoint what the Trainer does not write: what is needed to take a cut back.

        Args:
            folder (`Path`): The checkpoint.
        """
        if self._compressor.pending is not None:
            self._compressor.pending.save(folder)

    def _checkpoint_folder(self) -> Path:
        return checkpoint_folder(self._args.output_dir, self._state.global_step)

    def ended(self) -> None:
        """Let go of the training data and of the fast scan."""
        self._fast_scan.close()
        # They have closed their files.
        self._trackers = []
        self._batches.close()
        mark_ended(self._args.output_dir)
        if self._compressor.pending is not None:
            self._compressor.accept()
            logger.warning("the training ended before the latest cut was judged; the cut stays.")

    def went_back(self) -> None:
        """Record what fell away where the run's best checkpoint, which is loaded at its end, is from before a cut."""
        best = self._state.best_global_step
        expected = sizes_after(self._compressor.records)
        if best is None or all(self._compressor.sizes.get(name, size) == size for name, size in expected.items()):
            return
        self.returned_to = best
        added = records_of_best(self._compressor.records, best, self._state.global_step)
        # The trackers have closed their files.
        self._trackers = []
        self._compressor.restore([*self._compressor.records, *added])
        expected = sizes_after(self._compressor.records)
        if any(self._compressor.sizes.get(name, size) != size for name, size in expected.items()):
            logger.warning(
                "checkpoint-%d, which load_best_model_at_end loaded, has state sizes %s; by this run's records they "
                "were %s. Save the model with model.save_pretrained and without this history.",
                best, self._compressor.sizes, expected,
            )  # fmt: skip
        self._keep(added)

    def _averages(self) -> dict[str, Any]:
        """What the user named, and every averaged model that another callback holds."""
        named = {f"averaged_weights {number}": value for number, value in enumerate(self._averaged_weights)}
        held = {
            f"callback {number} {name}": value
            for number, other in enumerate(self._neighbours)
            for name, value in vars(other).items()
            if isinstance(value, AveragedModel)
        }
        return {**named, **held}

    def _resume(self, saved: SavedRun) -> None:
        pending = None
        judge_at = None if self._watch is None or saved.pending is None else self._watch.restore(saved.pending)
        if judge_at is not None:
            try:
                pending = PendingCut.load(self._checkpoint_folder(), judge_at)
            except FileNotFoundError:
                logger.warning(
                    "%s holds no snapshot; the cut made before it can no longer be taken back.",
                    self._checkpoint_folder(),
                )
        self._compressor.restore(saved.records, pending)
        expected = sizes_after(saved.records)
        if any(self._compressor.sizes.get(name, size) != size for name, size in expected.items()):
            self._put_base_in(expected)

    def _put_base_in(self, expected: dict[str, int]) -> None:
        """The checkpoint did not bring the sizes of its records, as one that holds an adapter alone."""
        try:
            base = Snapshot.load(self._checkpoint_folder(), LAYERS_NAME)
        except FileNotFoundError as error:
            raise UnsupportedModelError(
                f"the checkpoint's records say that the state sizes are {expected}, the model has "
                f"{self._compressor.sizes}, and {self._checkpoint_folder()} holds no {LAYERS_NAME} to make up for it. "
                "Resume inside the run's output_dir, or give the Trainer a model with these state sizes."
            ) from error
        self._compressor.put_in(base)

    def _check(self, step: int) -> None:
        if self._watch is not None:
            self._watch.require_comparison()
        self._keep(self._compressor.check_or_skip(lambda: self._batches.draw(step), step, self.steps))
        tries_again = self._watch is None and step < self._state.max_steps
        warn_if_given_up(self._compressor.records, self.steps, step, tries_again)

    def _keep(self, records: list[CheckRecord]) -> None:
        for record in records:
            log_line(record.summary(), self._args, self._state)
            log_figures(record.scalars(), self._trackers, self._args, self._state, self._control, self._model)
        if self._state.is_world_process_zero:
            try:
                write_history(self._compressor.records, self._args.output_dir)
            except OSError as error:
                # The records are in every checkpoint too; a full disk is no reason to lose a run.
                logger.warning("%s could not be written: %s", HISTORY_NAME, error)


def _drop_stale_states(optimizer: Any) -> None:
    stale = drop_stale_states(optimizer)
    if stale:
        logger.warning(
            "%d parameters changed their size since they were last trained; their optimizer state is reset.", stale
        )
