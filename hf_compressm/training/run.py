"""One training run under compression: what has to be remembered between the Trainer's events."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..architectures import enable_fast_cpu_scan
from ..compression import CheckRecord, Compressor, LossFunction, Snapshot, drop_stale_states, write_history
from ..config import CompreSSMConfig
from ..errors import CalibrationError, NotFiniteError, TruncationError, UnstableSystemError
from ..ops import compile_kernels
from .batches import training_batches
from .requirements import require_plain_run
from .resume import SavedRun
from .rollback import EvaluationWatch
from .schedule import check_steps
from .trackers import find_trackers, report

logger = logging.getLogger(__name__)


class CompressionRun:
    """
    The checks of one `Trainer.train()`, from its first step to its last.

    Args:
        config ([`CompreSSMConfig`]): What to cut, how and when.
        callback (`transformers.TrainerCallback`): The callback of the Trainer that this run belongs to.
        args, state, control, model, optimizer, train_dataloader: What the Trainer gives to `on_train_begin`.
        saved ([`~training.resume.SavedRun`]): What the checkpoint of a resumed run holds.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss.
        calibration_batches (`Iterable`, *optional*): Batches that the user gave.

    Raises:
        [`~errors.UnsupportedModelError`]: the model or the kind of run cannot be compressed.
        [`~errors.ConfigurationError`]: the schedule does not fit the run.
    """

    def __init__(
        self,
        config: CompreSSMConfig,
        callback: TrainerCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Any,
        saved: SavedRun,
        loss_function: LossFunction | None = None,
        calibration_batches: Iterable[Any] | None = None,
    ) -> None:
        require_plain_run(args)
        self.config = config
        self.steps = check_steps(config, state.max_steps)
        self._args, self._state, self._control, self._model = args, state, control, model
        self._watch = EvaluationWatch(config, args, self.steps) if config.judged_by_evaluation else None
        show = state.is_world_process_zero and not args.disable_tqdm
        self._compressor = Compressor(
            model, config, loss_function=loss_function, optimizer=optimizer, progress=None if show else False
        )
        self._resume(saved)
        stale = drop_stale_states(optimizer)
        if stale:
            logger.warning(
                "%d parameters changed their size since they were last trained; their optimizer state is reset.",
                stale,
            )
        self._batches = training_batches(
            model,
            train_dataloader,
            args.train_batch_size,
            config.calibration_batches,
            args.seed + config.seed,
            given=calibration_batches,
        )
        self._trackers = find_trackers(callback)
        if config.fast_cpu_scan:
            enable_fast_cpu_scan()
            if next(model.parameters()).device.type == "cpu":
                compile_kernels()
        sizes = sorted(set(self._compressor.sizes.values()))
        self._tell(
            f"{len(self._compressor.layers)} layers with state size {', '.join(map(str, sizes))}; "
            f"checks after the steps {', '.join(map(str, self.steps))}"
        )

    @property
    def records(self) -> list[CheckRecord]:
        """What every check saw and did."""
        return list(self._compressor.records)

    def pending(self) -> dict[str, Any] | None:
        """What a resumed run has to know of a cut that is still to be judged, as JSON values."""
        return None if self._watch is None else self._watch.state()

    def step_begins(self) -> None:
        """Let a stream's batches be kept on the way to a check."""
        horizon = range(self._state.global_step + 1, self._state.global_step + 1 + self.config.calibration_batches)
        self._batches.arm(not self._compressor.is_finished and any(step in self.steps for step in horizon))

    def step_ended(self) -> None:
        """Check where one is due, and ask for the evaluations that judge it."""
        step = self._state.global_step
        if step in self.steps and not self._compressor.is_finished:
            self._check(step)
        if self._watch is not None and not self._compressor.is_finished and self._watch.wants_evaluation(step):
            self._control.should_evaluate = True

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Take a cut back where the evaluation says so."""
        if self._watch is None:
            return
        reason = self._watch.evaluated(metrics, self._state.global_step)
        if reason is not None:
            record = self._compressor.take_back(reason, step=self._state.global_step)
            self._keep([record])
        elif self._watch.judge_at is None:
            self._compressor.snapshot = None

    def saved(self) -> None:
        """Keep what is needed to take a cut back beside the checkpoint that was written before its judgement."""
        snapshot = self._compressor.snapshot
        folder = Path(self._args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self._state.global_step}"
        if snapshot is not None and self._state.is_world_process_zero and folder.is_dir():
            snapshot.save(folder)

    def ended(self) -> None:
        """Let go of the training data."""
        self._batches.close()

    def _resume(self, saved: SavedRun) -> None:
        snapshot = None
        if self._watch is not None and saved.pending is not None:
            self._watch.restore(saved.pending)
            if self._watch.judge_at is not None:
                folder = Path(self._args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self._state.global_step}"
                try:
                    snapshot = Snapshot.load(folder)
                except FileNotFoundError:
                    self._watch.judge_at = None
                    logger.warning("%s holds no snapshot; the cut made before it can no longer be taken back.", folder)
        self._compressor.restore(saved.records, snapshot)

    def _check(self, step: int) -> None:
        if self._watch is not None:
            self._watch.require_comparison()
        known = len(self._compressor.records)
        try:
            record = self._compressor.check(
                self._batches.draw(step), step=step, number=self.steps.index(step) + 1, total=len(self.steps)
            )
        except (CalibrationError, NotFiniteError, TruncationError, UnstableSystemError) as error:
            record = self._compressor.skip(str(error), step=step)
            logger.warning("the check after step %d was skipped: %s", step, error)
        if self._watch is not None and record.outcome == "cut":
            self._watch.cut_made(step)
        self._keep(self._compressor.records[known:])

    def _keep(self, records: list[CheckRecord]) -> None:
        for record in records:
            self._tell(record.summary())
            report(record.scalars(), self._trackers, self._args, self._state, self._control, self._model)
        if self._state.is_world_process_zero:
            write_history(self._compressor.records, self._args.output_dir)

    def _tell(self, line: str) -> None:
        logger.info(line)
        if self._state.is_world_process_zero and not self._args.disable_tqdm:
            tqdm.write(f"[compressm] {line}")
