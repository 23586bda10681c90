"""One segment of a run that is cut between two trainings, as FSDP needs it: train, save, stop where a check is due."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ...compression import CheckRecord, keep_old_history
from ...compression.decide.progress import is_finished
from ...errors import ConfigurationError
from ..checkpoints.running_mark import mark_active, mark_ended
from ..resume import SavedRun
from ..schedule import check_steps
from ..trackers import log_figures, log_line, trackers_among
from ..trainer_lookup import neighbours

if TYPE_CHECKING:
    from ..callback import CompreSSMCallback


class SegmentRun:
    """
    What a [`~training.run.CompressionRun`] is to a run that is cut in place: the same events, without a check.

    Args:
        callback ([`CompreSSMCallback`]): The callback that this run belongs to, with its settings.
        args, state, control, model: What the Trainer gives to `on_train_begin`.
        saved ([`~training.resume.SavedRun`]): What the segment's checkpoint holds.
        sizes (`dict[str, int]`): State size of each layer, by its name.

    Raises:
        [`~errors.ConfigurationError`]: the schedule does not fit the run.
    """

    def __init__(
        self,
        callback: CompreSSMCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        saved: SavedRun,
        sizes: dict[str, int],
    ) -> None:
        self.config = callback.config
        self.steps = check_steps(self.config, state.max_steps)
        if self.steps[-1] >= state.max_steps:
            raise ConfigurationError(
                f"the last check comes after step {self.steps[-1]} of {state.max_steps}, and a cut between two "
                "segments needs a segment after it. Let the window end earlier, or use compress() after the training."
            )
        self.records: list[CheckRecord] = list(saved.records)
        self.paused = False
        self._args, self._state, self._control, self._sizes = args, state, control, sizes
        if args.should_save:
            mark_active(args.output_dir)
            if state.global_step == 0:
                keep_old_history(args.output_dir)
        if state.global_step == 0:
            listed = ", ".join(map(str, sorted(set(sizes.values()))))
            log_line(
                f"{len(sizes)} layers with state size {listed}; checks, between segments, after the steps "
                f"{', '.join(map(str, self.steps))}",
                args,
                state,
            )
        trackers = trackers_among(neighbours(callback))
        for record in (record for record in self.records if record.step == state.global_step):
            # The check was made before the Trainer and its trackers were there.
            log_line(record.summary(), self._args, self._state)
            log_figures(record.scalars(), trackers, args, state, control, model)

    def pending(self) -> dict[str, Any] | None:
        """Nothing: a cut between segments is judged at once or not at all."""
        return None

    def step_begins(self) -> None:
        """Nothing to prepare."""

    def step_ended(self) -> None:
        """End the segment where a check is due."""
        step = self._state.global_step
        if step in self.steps and not is_finished(self.records, self.config, list(self._sizes)):
            self.paused = True
            self._control.should_save = self._control.should_training_stop = True
            # The losses since the latest log would be lost otherwise: the Trainer sums them up in memory.
            self._control.should_log |= self._args.logging_strategy != IntervalStrategy.NO

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Nothing to judge."""

    def saving_checkpoint(self) -> None:
        """Nothing is checked while a segment is trained."""

    def checkpoint_saved(self, folder: Path) -> None:
        """Nothing to add to the checkpoint."""

    def ended(self) -> None:
        """Let other processes have the folder."""
        mark_ended(self._args.output_dir)
