"""`CompreSSMCallback`: the plain Trainer's events translated into checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..compression import CheckRecord, LossFunction
from ..config import CompreSSMConfig
from ..validation import require_function
from .batches import require_lasting_batches
from .card.keeper import keep_card
from .checkpoints.replacing import after_replacing, before_replacing, set_aside_incomplete, wait_until_set_aside
from .resume import arguments_json_cannot_hold, follow_checkpoints, require_arguments_of_saved, saved_run
from .run import CompressionRun
from .segments.run import SegmentRun
from .supported_runs import require_plain_run


class CompreSSMCallback(TrainerCallback, ExportableState):
    """
    Cuts the state of a model's layers while the Trainer trains it.

    A check follows the optimizer step that the schedule names and precedes the Trainer's logging, evaluation and saving
    of the same step, which already see the smaller model. Each check adds an entry to `compressm_history.json` in
    `args.output_dir`, to the Trainer's log history and to its trackers. On a CPU the fused scan is on while the
    Trainer trains (see [`fast_cpu_scan`] for the evaluation afterwards).

    A run resumes from its checkpoints, at whatever size they are, with a model that was built at the original size;
    for that the callback must be among the Trainer's `callbacks` when the Trainer is made.

    Args:
        config ([`CompreSSMConfig`] or its `dict`, *optional*): What to cut, how and when.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        calibration_batches (`Iterable`, *optional*): Batches to calibrate on. When unset, they are drawn from the
            training set, or, where that is a stream, kept from the training steps.
        averaged_weights (`Iterable`, *optional*): Averages of the model's weights that are kept elsewhere and have to
            be cut with it: modules, or dictionaries of tensors by parameter name; read at each cut. A
            `torch.optim.swa_utils.AveragedModel` in an attribute of another callback is found without it.

    Raises:
        [`~errors.ConfigurationError`]: `config` is of another type, or a setting in it is not allowed.

    Example:

    ```python
    from transformers import Trainer
    from hf_compressm import CompreSSMCallback, CompreSSMConfig

    trainer = Trainer(model=model, args=args, train_dataset=dataset,
                      callbacks=[CompreSSMCallback(CompreSSMConfig(tolerance=0.01))])
    trainer.train()
    trainer.save_model("smaller")  # an ordinary checkpoint with the new state size
    ```
    """

    def __init__(
        self,
        config: CompreSSMConfig | dict[str, Any] | None = None,
        loss_function: LossFunction | None = None,
        calibration_batches: Iterable[Any] | None = None,
        averaged_weights: Iterable[Any] = (),
    ) -> None:
        self.config = CompreSSMConfig.coerced(config)
        self.loss_function = require_function("loss_function", loss_function)
        self.calibration_batches = require_lasting_batches("calibration_batches", calibration_batches)
        # One average by itself is meant as a list of one.
        single = isinstance(averaged_weights, (nn.Module, Mapping))
        self.averaged_weights = [averaged_weights] if single else averaged_weights
        self._run: CompressionRun | SegmentRun | None = None
        self._is_whole = False
        self._sizes_in_segments: dict[str, int] | None = None

    @property
    def records(self) -> list[CheckRecord]:
        """What every check of the latest training saw and did."""
        return [] if self._run is None else self._run.records

    @property
    def returned_to(self) -> int | None:
        """The training step past whose later cuts `load_best_model_at_end` went back, or None."""
        return self._run.returned_to if isinstance(self._run, CompressionRun) else None

    @property
    def is_paused(self) -> bool:
        """Whether the latest training ended so that a check can be made; see [`train_in_segments`]."""
        return isinstance(self._run, SegmentRun) and self._run.paused

    def train_whole(self) -> None:
        """Expect a model that no wrapper shards, whatever the arguments say of FSDP; see [`train_in_segments`]."""
        self._is_whole, self._sizes_in_segments = True, None

    def pause_at_checks(self, sizes: dict[str, int]) -> None:
        """
        Save and stop at the next check, which is made between two trainings; see [`train_in_segments`].

        Args:
            sizes (`dict[str, int]`): State size of each layer, by its name.
        """
        self._is_whole, self._sizes_in_segments = False, dict(sizes)

    def saving_checkpoint(self) -> None:
        """
        Called before the Trainer's `save_model` writes into a checkpoint, whoever asks for it and at whatever time.

        On SIGTERM, with `enable_jit_checkpoint`, the Trainer saves before the other callbacks hear of the step's end.
        """
        if self._run is not None:
            self._run.saving_checkpoint()

    def checkpoint_saved(self, folder: Path) -> None:
        """
        Complete a checkpoint; `on_save` would be too late, as it follows the push and not every save.

        Args:
            folder (`Path`): The checkpoint, with the model.
        """
        if self._run is not None:
            self._run.checkpoint_saved(folder)

    def state(self) -> dict[str, Any]:
        """The settings and the records so far, as the Trainer writes them into every checkpoint."""
        attributes = {
            "saved_records": [record.to_dict() for record in self.records],
            "saved_judgement": None if self._run is None else self._run.pending(),
            "saved_arguments": arguments_json_cannot_hold(self),
        }
        return {"args": {"config": self.config.to_dict()}, "attributes": attributes}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Let the model take the state size of a checkpoint that is loaded later; set incomplete ones aside."""
        follow_checkpoints(model)
        keep_card(self)
        (set_aside_incomplete if args.should_save else wait_until_set_aside)(args.output_dir)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the layers and the steps to check; everything that cannot work is refused here."""
        require_arguments_of_saved(self)
        if self._run is not None:
            self._run.ended()
        keep_card(self)
        if self._sizes_in_segments is not None:
            saved, sizes = saved_run(state, self), self._sizes_in_segments
            self._sizes_in_segments = None
            self._run = SegmentRun(self, args, state, control, model, saved, sizes)
            return
        require_plain_run(args, self._is_whole)
        # A search over hyperparameters makes a new model, a smaller batch after a lack of memory a new start.
        follow_checkpoints(model)
        optimizer, data = kwargs["optimizer"], kwargs["train_dataloader"]
        self._run = CompressionRun(self, args, state, control, model, optimizer, data, saved_run(state, self))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a stream's batches be kept on the way to a check."""
        self._run.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check after the steps that the schedule names."""
        self._run.step_ended()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no checkpoint be overwritten half-way."""
        if control.should_save and args.should_save:
            before_replacing(args.output_dir, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the trackers draw state size and parameters from the first step on."""
        if isinstance(self._run, CompressionRun):
            self._run.logged()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Judge a cut where an evaluation was asked for it."""
        if self._run is not None:
            self._run.evaluated(metrics or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is whole; the one that it replaces is deleted only now."""
        if args.should_save:
            after_replacing(args.output_dir, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the training data; take note where `load_best_model_at_end` went back past a cut."""
        if args.load_best_model_at_end and isinstance(self._run, CompressionRun):
            self._run.went_back()
        self._run.ended()
