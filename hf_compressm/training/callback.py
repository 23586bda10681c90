"""`CompreSSMCallback`: the plain Trainer's events translated into checks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..architectures import enable_fast_cpu_scan
from ..compression import CheckRecord, Compressor, LossFunction, OptimizerChange, write_history
from ..config import CompreSSMConfig
from ..errors import CalibrationError, ConfigurationError, NotFiniteError, TruncationError
from ..ops import compile_kernels
from .batches import training_batches
from .card import keep_card
from .requirements import require_plain_run
from .resume import follow_checkpoints, saved_records
from .schedule import check_steps
from .trackers import find_trackers, report

logger = logging.getLogger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """
    Cuts the state of a model's layers while the Trainer trains it.

    A check follows the optimizer step that the schedule names and precedes the Trainer's logging, evaluation and saving
    of the same step, which already see the smaller model. Each check adds an entry to `compressm_history.json` in
    `args.output_dir`, to the Trainer's log history and to its trackers. On a CPU the fused scan is switched on and
    stays on after training, for the evaluation (see [`disable_fast_cpu_scan`]).

    A run resumes from its checkpoints, at whatever size they are, with a model that was built at the original size;
    for that the callback must be among the Trainer's `callbacks` when the Trainer is made.

    Args:
        config ([`CompreSSMConfig`] or its `dict`, *optional*): What to cut, how and when.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        calibration_batches (`Iterable`, *optional*): Batches to calibrate on. When unset, they are drawn from the
            training set, or, where that is a stream, kept from the training steps.

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
    ) -> None:
        if isinstance(config, dict):
            config = CompreSSMConfig.from_dict(config)
        if config is not None and not isinstance(config, CompreSSMConfig):
            raise ConfigurationError(f"config is a {type(config).__name__}; give a CompreSSMConfig.")
        self.config = config or CompreSSMConfig()
        self._loss_function = loss_function
        self._given_batches = calibration_batches
        self._compressor: Compressor | None = None
        self._due: frozenset[int] = frozenset()

    @property
    def records(self) -> list[CheckRecord]:
        """What every check of the latest training saw and did."""
        return [] if self._compressor is None else list(self._compressor.records)

    def state(self) -> dict[str, Any]:
        """The settings and the records so far, as the Trainer writes them into every checkpoint."""
        records = [record.to_dict() for record in self.records]
        return {"args": {"config": self.config.to_dict()}, "attributes": {"saved_records": records}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Let the model take the state size of a checkpoint that is loaded later."""
        follow_checkpoints(model)
        keep_card(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the layers and the steps to check; everything that cannot work is refused here."""
        require_plain_run(args)
        keep_card(self)
        steps = check_steps(self.config, state.max_steps)
        optimizer = kwargs["optimizer"]
        self._compressor = Compressor(
            model,
            self.config,
            loss_function=self._loss_function,
            followers=[lambda changes: OptimizerChange(optimizer, changes)],
            progress=False,
        )
        self._compressor.restore(saved_records(state, self))
        self._batches = training_batches(
            model,
            kwargs["train_dataloader"],
            args.train_batch_size,
            self.config.calibration_batches,
            args.seed + self.config.seed,
            given=self._given_batches,
        )
        self._due = frozenset(steps)
        self._trackers = find_trackers(self)
        if self.config.fast_cpu_scan:
            enable_fast_cpu_scan()
            if next(model.parameters()).device.type == "cpu":
                compile_kernels()
        sizes = sorted(set(self._compressor.sizes.values()))
        self._tell(
            f"{len(self._compressor.layers)} layers with state size {', '.join(map(str, sizes))}; "
            f"checks after the steps {', '.join(map(str, steps))}",
            args,
            state,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a stream's batches be kept on the way to a check."""
        horizon = range(state.global_step + 1, state.global_step + 1 + self.config.calibration_batches)
        self._batches.arm(any(step in self._due for step in horizon))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check after the steps that the schedule names."""
        if state.global_step not in self._due:
            return
        try:
            record = self._compressor.check(self._batches.draw(state.global_step), step=state.global_step)
        except (CalibrationError, NotFiniteError, TruncationError) as error:
            record = self._compressor.skip(str(error), step=state.global_step)
            logger.warning("the check after step %d was skipped: %s", state.global_step, error)
        self._tell(record.summary(), args, state)
        report(record.scalars(), self._trackers, args, state, control, model)
        if state.is_world_process_zero:
            write_history(self._compressor.records, args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the training data."""
        self._batches.close()

    def _tell(self, line: str, args: TrainingArguments, state: TrainerState) -> None:
        logger.info(line)
        if state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(f"[compressm] {line}")
