"""One check from beginning to end: calibrate, decide, cut all layers or none, verify, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import can_hold_forms, fast_cpu_scan, find_layers
from ..config import CompreSSMConfig
from ..errors import (
    CalibrationError,
    DisagreementError,
    NotFiniteError,
    OtherProcessError,
    TruncationError,
    UnstableSystemError,
)
from .attempt import CutMaker, attempt_cut
from .costs import step_timer
from .cut.pending_cut import PendingCut
from .cut.snapshot import Snapshot
from .cut.training_state import Follow, TrainingState
from .decide.chosen import Chosen, free_to_change, split_in_half
from .decide.plan import LayerPlan, plan_reduction
from .decide.progress import Stage, check_number, combined_seed, is_finished, score_correlation, stage_of
from .decide.rows import RowChoice
from .history import CheckRecord
from .layer_records import Seen, forms_of, layer_records, records_of_return, warn_of_added_parameters
from .measure.calibration import Calibration, calibrate
from .measure.model_pass import LossFunction, evaluate_loss
from .measure.output_error import OutputsOf
from .measure.output_fits import output_fits
from .processes import Processes, SingleProcess
from .size_table import measure_sizes, require_sizes
from .spectrum import Spectrum
from .trials import Trials

logger = logging.getLogger(__name__)

Batches = Sequence[Any] | Callable[[], Sequence[Any]]


class Compressor:
    """
    Cuts the state of a model's layers, check by check, and remembers what it did.

    Args:
        model (`torch.nn.Module`): The model; it is changed in place.
        config ([`CompreSSMConfig`]): What to cut and how.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        optimizer (`torch.optim.Optimizer`, *optional*): Trains the model on, with moments that move along.
        followers (`Sequence[Follow]`, *optional*): What else changes together with the model.
        processes ([`~compression.processes.Processes`], *optional*): The processes that train the model together.
        find_copies (`Callable`, *optional*): Returns modules, or dictionaries of tensors by parameter name, that may be
            copies of the model's weights (an average over steps, say) and are cut with it where they are; each by a
            name that stays the same in a resumed run.
        progress (`bool`, *optional*): Show progress bars; when unset, only on a terminal.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no supported layer, one that cannot be cut, or one that cannot
            hold what the configuration asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompreSSMConfig,
        loss_function: LossFunction | None = None,
        optimizer: Any = None,
        followers: Sequence[Follow] = (),
        processes: Processes | None = None,
        find_copies: Callable[[], Mapping[str, Any]] = dict,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = find_layers(model)
        self.records: list[CheckRecord] = []
        self.pending: PendingCut | None = None
        self._loss_function = loss_function
        self._processes = processes or SingleProcess()
        self._progress = progress
        self._scores: dict[str, Tensor] = {}
        self._chosen = Chosen.of(self.layers, config, lambda layer: can_hold_forms(model, layer))
        self._limits = self._chosen.limits(config)
        self._fits_readouts = optimizer is None if config.fit_readout is None else config.fit_readout
        self._state = TrainingState(
            model, self.layers, optimizer, config.optimizer_moments, tuple(followers), find_copies
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The present state size of each layer, by its name."""
        return {layer.name: layer.state_size for layer in self.layers}

    @property
    def batches_per_check(self) -> int:
        """How many batches a check makes use of."""
        return self._chosen.batches_per_check(self.config)

    @property
    def is_finished(self) -> bool:
        """Whether no later check can cut anything."""
        return is_finished(self.records, self.config, list(self._chosen.reductors))

    def check(self, batches: Batches, step: int | None = None, number: int = 1, total: int = 1) -> CheckRecord:
        """
        Calibrate on the batches and cut where the configuration asks for it.

        Where cuts are judged by the calibration loss, one that makes it worse by more than `rollback_tolerance` is
        taken back at once. Where they are judged later, what a cut replaced is kept in `pending`.

        Args:
            batches (`Sequence` or `Callable`): Inputs of the model, or a function that returns them; they are run up to
                twice.
            step (`int`, *optional*): The training step, for the record and for the seeds.
            number (`int`, *optional*, defaults to 1): Which check of the run it is, from 1 to `total`.
            total (`int`, *optional*, defaults to 1): Checks in the whole run.

        Returns:
            [`CheckRecord`]: What was seen and done; it is also appended to `records`. A second one follows, and is
                returned, where the cut was taken back.

        Raises:
            [`~errors.CalibrationError`]: the batches give no finite loss or Gramians. Nothing was changed.
        """
        try:
            return self._check(batches() if callable(batches) else batches, step, number, total)
        except BaseException as error:
            if not isinstance(error, (OtherProcessError, DisagreementError)):
                self._processes.failed(error)
            raise

    def _check(self, batches: Sequence[Any], step: int | None, number: int, total: int) -> CheckRecord:
        start, parameters = time.perf_counter(), self._count_parameters()
        config, seed = self.config, combined_seed(self.config.seed, step)
        with torch.inference_mode(False), fast_cpu_scan(config.fast_cpu_scan):
            batches, others = self._chosen.split(batches, config)
            calibration = self._calibrate(batches, seed)
            batches = [batch for place, batch in enumerate(batches) if place not in calibration.left_out]
            seen = self._see(calibration)
            stage = stage_of(self.records, config, seen.correlations, number, total)
            maker = self._maker(seen, self._limits, batches, seed)
            trials = Trials(maker, lambda: self._loss_on(others))
            plan, alternative = self._decide(trials, seen.spectra, stage)
            planned = [layer for layer in self._chosen.layers if layer.name in plan]
            outputs = OutputsOf(planned, self.model, others, self._loss_function)
            self._chosen.warn_of_refused_sizes({name: layer.new_size for name, layer in plan.items() if layer.is_cut})
            look = (lambda: self._loss(batches), lambda cut: seen.note_cut(cut, outputs.errors(self._processes.sum)))
            result = attempt_cut(maker, plan, alternative, calibration.loss, *look, step)
            self.pending = result.pending or self.pending
        self._scores.update(seen.scores)
        layers = layer_records(self.layers, plan, seen, result.found)
        measured = {"loss_before": calibration.loss, "loss_after": result.loss_after}
        what = (result.outcome, result.reason, step, parameters, start)
        record = self._record(*what, layers=layers, trials=trials.records, **measured)
        warn_of_added_parameters(record, self._chosen.layers)
        return self._judged(record)

    def measure(self, batches: Sequence[Any], sizes: Sequence[int] = (), timed: bool = True) -> Spectrum:
        """
        The spectra that a check would see, and what the model would be at some state sizes. Nothing is changed.

        Args:
            batches (`Sequence`): As in [`~Compressor.check`]. For a table of sizes the cuts are made with the first
                half, and the losses are those of the second.
            sizes (`Sequence[int]`, *optional*): State sizes below the present one.
            timed (`bool`, *optional*, defaults to `True`): Time a training step at each size.

        Raises:
            [`~errors.CalibrationError`]: there are too few batches, or they give no finite loss or Gramians.
            [`~errors.ConfigurationError`]: a size is not possible.
        """
        seed = combined_seed(self.config.seed, None)
        with torch.inference_mode(False), fast_cpu_scan(self.config.fast_cpu_scan):
            half, others = split_in_half(batches, "a table of sizes") if sizes else ([], [])
            require_sizes(sizes, self._chosen.layers)
            calibration = self._calibrate(self._chosen.split(batches, self.config)[0], seed)
            spectra, rows = self._see(calibration).spectra, []
            if sizes:
                seen = self._see(self._calibrate(half, seed))
                layers = [layer for layer in self._chosen.layers if layer.name in seen.gramians]
                maker = self._maker(seen, self.config, half, seed)
                time_step = step_timer(self.model, others[0], self._loss_function) if timed else None
                rows = measure_sizes(maker, layers, sizes, lambda: self._loss_on(others), time_step)
        return Spectrum(spectra, calibration.loss, tuple(rows))

    def _calibrate(self, batches: Sequence[Any], seed: int) -> Calibration:
        calibration = calibrate(
            self.model,
            self._chosen.layers,
            batches,
            gramians=self.config.gramians,
            fit_readout=self._fits_readouts,
            loss_function=self._loss_function,
            sum_over_processes=self._processes.sum,
            seed=seed,
            progress=self._progress,
        )
        if calibration.loss is None and self.config.can_roll_back and not self.config.judged_by_evaluation:
            raise CalibrationError(
                f"rollback_tolerance is {self.config.rollback_tolerance:g}, but the calibration batches give no loss "
                "that a cut could be judged by. Give batches with labels, or a loss_function."
            )
        return calibration

    def _maker(self, seen: Seen, config: CompreSSMConfig, batches: Sequence[Any], seed: int) -> CutMaker:
        layers, rest = self._chosen.layers, (self._processes, seed, self._progress)
        rows = RowChoice.of(self._chosen, config, self.records, self.model, batches, self._loss_function, seed)
        fits = output_fits(layers, self.model, batches, self._loss_function, *rest) if self._fits_readouts else ()
        return CutMaker(self._state, seen.gramians, self._chosen.reductors, config, *rest, fits, seen.state_bytes, rows)

    def _see(self, calibration: Calibration) -> Seen:
        """What the calibration says of the layers that may change, the same in every process."""
        gramians = free_to_change(self.layers, calibration.gramians, self._chosen.with_own_size)
        spectra = {name: known.hankel_singular_values() for name, known in gramians.items()}
        scores = {name: known.state_scores().flatten().cpu() for name, known in gramians.items()}
        spectra, scores = self._processes.first((spectra, scores))
        correlations = {name: score_correlation(self._scores.get(name), scores[name]) for name in scores}
        return Seen(gramians, spectra, scores, correlations, calibration.state_bytes, forms_of(self.layers))

    def _decide(self, trials: Trials, spectra: dict[str, Tensor], stage: Stage) -> tuple[dict[str, LayerPlan], str]:
        """The new size of each layer, and the way to truncate them."""
        sizes = {name: self.sizes[name] for name in spectra}
        if self.config.strategy == "loss":
            plan = trials.smallest(spectra, sizes, stage)
        else:
            plan = plan_reduction(spectra, sizes, self._limits, stage)
        return plan, trials.best_alternative(plan) if self.config.compare_truncations else ""

    def _loss_on(self, batches: Sequence[Any]) -> float:
        """The loss on batches that no truncation was made with; the same number in every process."""
        return self._processes.first(self._loss(batches))

    def check_or_skip(self, batches: Batches, step: int, steps: Sequence[int]) -> list[CheckRecord]:
        """
        Check as [`~Compressor.check`] does; one that fails ends no training but leaves a record that says why.

        Args:
            batches (`Sequence` or `Callable`): What to calibrate on, or a function that returns it.
            step (`int`): The training step.
            steps (`Sequence[int]`): The steps of all checks of the run.

        Returns:
            `list[CheckRecord]`: The new records; two where a cut was taken back at once.
        """
        known = len(self.records)
        try:
            self.check(batches, step=step, number=check_number(steps, step), total=len(steps))
        except DisagreementError:
            raise
        except (CalibrationError, NotFiniteError, TruncationError, UnstableSystemError) as error:
            self.skip(str(error), step=step)
            logger.warning("the check after step %d was skipped: %s", step, error)
        except Exception as error:
            # Of the user's model, loss or data; the training can go on without this check.
            self.skip(f"{type(error).__name__}: {error}", step=step)
            logger.exception("the check after step %d was skipped, and the training goes on", step)
        return self.records[known:]

    def _judged(self, record: CheckRecord) -> CheckRecord:
        if record.outcome != "cut" or self.config.judged_by_evaluation or self.pending is None:
            return record
        worse = record.loss_after - record.loss_before
        if worse <= self.config.rollback_tolerance:
            self.accept()
            return record
        return self.take_back(
            f"the calibration loss rose by {worse:.4g}, allowed is {self.config.rollback_tolerance:g}", record.step
        )

    def accept(self) -> None:
        """Accept the latest cut where it is still pending: what it replaced is let go."""
        self.pending = None

    def take_back(self, reason: str, step: int | None = None) -> CheckRecord:
        """
        Put back what the latest cut replaced: weights, copies of them, optimizer state, sizes and configs.

        Args:
            reason (`str`): Why, for the record.
            step (`int`, *optional*): The training step, for the record.

        Raises:
            `RuntimeError`: no cut is pending.
        """
        if self.pending is None:
            raise RuntimeError("no cut is pending, so that there is no snapshot to go back to")
        start, parameters, forms = time.perf_counter(), self._count_parameters(), forms_of(self.layers)
        self.pending.take_back(self._state)
        for name in self.pending.model.forms:
            self._scores.pop(name, None)
        self.pending = None
        layers = records_of_return(self.layers, forms)
        return self._record("rolled_back", reason, step, parameters, start, layers=layers)

    def restore(self, records: Sequence[CheckRecord], pending: PendingCut | None = None) -> None:
        """
        Go on from the records of an interrupted run.

        Args:
            records (`Sequence[CheckRecord]`): The records up to the checkpoint that the model was loaded from.
            pending ([`~compression.cut.pending_cut.PendingCut`], *optional*): The latest cut, where it was still to be
                judged.
        """
        self.records = list(records)
        self.pending = pending
        for record in records:
            for layer in record.layers:
                self._scores.pop(layer.name, None)
                if layer.state_scores:
                    self._scores[layer.name] = torch.tensor(layer.state_scores, dtype=torch.float64)

    def put_in(self, layers: Snapshot) -> None:
        """
        Give layers the sizes and tensors that a snapshot holds, as when a checkpoint did not hold them itself.

        Args:
            layers ([`Snapshot`]): Taken of the same model at any state size.

        Raises:
            [`~errors.DimensionError`]: a tensor of the snapshot has not the shape that its layer needs.
        """
        self._state.commit(layers.reductions(self.layers))

    def skip(self, reason: str, step: int | None = None) -> CheckRecord:
        """Record that a check could not be completed and that nothing was changed."""
        return self._record("skipped", reason, step, self._count_parameters())

    def _record(
        self, outcome: str, reason: str, step: int | None, parameters: int, start: float | None = None, **seen: Any
    ) -> CheckRecord:
        """Append a record of what began at `start` with this many parameters."""
        seconds = 0.0 if start is None else time.perf_counter() - start
        counts = {"parameters_before": parameters, "parameters_after": self._count_parameters()}
        record = CheckRecord(outcome, reason, step=step, seconds=seconds, **counts, **seen)
        self.records.append(record)
        return record

    def _loss(self, batches: Sequence[Any]) -> float:
        return evaluate_loss(self.model, batches, self._loss_function, self._processes.sum)

    def _count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())
