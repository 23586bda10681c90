"""One check from beginning to end: calibrate, decide, cut all layers or none, verify, record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import (
    LayerReduction,
    ParameterChange,
    StateSpaceLayer,
    all_changes,
    can_hold_forms,
    fast_cpu_scan,
    find_layers,
)
from ..config import CompreSSMConfig
from ..errors import CalibrationError, DisagreementError, OtherProcessError, TruncationError, UnsupportedModelError
from ..systems import Truncation
from .cut.changes import Change, DoneLast, ModelChange, UndoneLast, commit_together, roll_back_together
from .cut.optimizer import OptimizerChange
from .cut.snapshot import Snapshot
from .cut.weight_averages import copy_changes
from .decide.chosen import chosen_layers, free_to_change, require_own_sizes
from .decide.plan import LayerPlan, plan_reduction
from .decide.progress import is_finished, moment_of, score_correlation
from .decide.truncations import find_truncations
from .history import CheckRecord, LayerRecord
from .measure.calibration import Calibration, calibrate
from .measure.model_pass import LossFunction, evaluate_loss
from .processes import Processes, SingleProcess

Follow = Callable[[Sequence[ParameterChange]], Change]
"""Prepares what has to change beside the model and its optimizer (a wrapper, say) when parameters are replaced."""


class Compressor:
    """
    Cuts the state of a model's layers, check by check, and remembers what it did.

    Args:
        model (`torch.nn.Module`): The model; it is changed in place.
        config ([`CompreSSMConfig`]): What to cut and how.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        optimizer (`torch.optim.Optimizer`, *optional*): Trains the model: its groups get the new parameters, its
            moments are carried over.
        followers (`Sequence[Follow]`, *optional*): What else changes together with the model.
        processes ([`~compression.processes.Processes`], *optional*): The processes that train the model together.
        find_copies (`Callable`, *optional*): Returns modules, or dictionaries of tensors by parameter name, that may be
            copies of the model's weights (an average over steps, say) and are cut with it where they are.
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
        find_copies: Callable[[], Iterable[Any]] = tuple,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = find_layers(model)
        self.records: list[CheckRecord] = []
        self.snapshot: Snapshot | None = None
        self._loss_function = loss_function
        self._optimizer = optimizer
        self._followers = list(followers)
        self._processes = processes or SingleProcess()
        self._find_copies = find_copies
        self._cut_copies: list[Change] = []
        self._progress = progress
        self._scores: dict[str, Tensor] = {}
        self._chosen = chosen_layers(self.layers, config)
        self._reductors = {layer.name: self._reductor_of(layer) for layer in self._chosen}
        self._require_sizes_that_fit()

    def _reductor_of(self, layer: StateSpaceLayer) -> str:
        stock, name = self._needs_stock(layer), self.config.reductor
        name = layer.default_reductor(stock) if name == "auto" else name
        if name not in layer.reductors(stock):
            raise UnsupportedModelError(
                f"{layer.name} ({layer.family}) cannot hold what the reductor {name!r} gives"
                f"{' in a stock model class' if name in layer.reductors(False) else ''}; "
                f"choose one of {', '.join(sorted(layer.reductors(stock)))}."
            )
        return name

    def _needs_stock(self, layer: StateSpaceLayer) -> bool:
        """Whether a layer may only take a form that the model's present class holds."""
        return self.config.stock or not can_hold_forms(self.model, layer)

    def _require_sizes_that_fit(self) -> None:
        fixed = [layer.name for layer in self._chosen if not self._may_differ(layer)]
        require_own_sizes(self.layers, self._reductors, self._may_differ)
        if not self.config.uniform and len(self._chosen) > 1 and fixed:
            raise UnsupportedModelError(
                f"uniform=False would give each layer its own state size, which the checkpoint of {fixed[0]} "
                f"({self.layers[0].family}) cannot hold. Leave uniform=True."
            )

    def _may_differ(self, layer: StateSpaceLayer) -> bool:
        return layer.sizes_may_differ(self._needs_stock(layer), self._reductors[layer.name])

    @property
    def sizes(self) -> dict[str, int]:
        """The present state size of each layer, by its name."""
        return {layer.name: layer.state_size for layer in self.layers}

    @property
    def is_finished(self) -> bool:
        """Whether no later check can cut anything."""
        return is_finished(self.records, self.config, list(self._reductors))

    def check(self, batches: Sequence[Any], step: int | None = None, number: int = 1, total: int = 1) -> CheckRecord:
        """
        Calibrate on the batches and cut where the configuration asks for it.

        Where cuts are judged by the calibration loss, one that makes it worse by more than `rollback_tolerance` is
        taken back at once. Where they are judged later, what a cut replaced is kept in `snapshot`.

        Args:
            batches (`Sequence`): Inputs of the model; they are run up to twice.
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
            return self._check(batches, step, number, total)
        except BaseException as error:
            if not isinstance(error, (OtherProcessError, DisagreementError)):
                self._processes.failed(error)
            raise

    def _check(self, batches: Sequence[Any], step: int | None, number: int, total: int) -> CheckRecord:
        start = time.perf_counter()
        seed = _combined_seed(self.config.seed, step)
        parameters = self._count_parameters()
        with torch.inference_mode(False), fast_cpu_scan(self.config.fast_cpu_scan):
            calibration = calibrate(
                self.model,
                self._chosen,
                batches,
                gramians=self.config.gramians,
                loss_function=self._loss_function,
                sum_over_processes=self._processes.sum,
                seed=seed,
                progress=self._progress,
            )
            self._require_judge(calibration.loss)
            batches = [batch for number, batch in enumerate(batches) if number not in calibration.left_out]
            measured = free_to_change(self.layers, calibration.gramians, self._may_differ)
            spectra = {name: gramians.hankel_singular_values() for name, gramians in measured.items()}
            scores = {name: gramians.state_scores().flatten() for name, gramians in measured.items()}
            spectra, scores = self._processes.first((spectra, scores))
            correlations = {name: score_correlation(self._scores.get(name), scores[name]) for name in scores}
            moment = moment_of(self.records, self.config, correlations, number, total)
            plan = plan_reduction(spectra, {name: self.sizes[name] for name in measured}, self.config, moment)
            result = self._carry_out(plan, calibration, batches, seed)
        lost = {name: measured[name].lost_energy(truncation) for name, truncation in result.truncations.items()}
        for name, gramians in measured.items():
            truncation = result.truncations.get(name)
            after = scores[name] if truncation is None else gramians.scores_after(truncation).flatten()
            self._scores[name] = after.cpu()
        record = CheckRecord(
            outcome=result.outcome,
            reason=result.reason,
            layers=self._layer_records(plan, result, spectra, correlations, lost),
            step=step,
            loss_before=calibration.loss,
            loss_after=result.loss_after,
            seconds=time.perf_counter() - start,
            parameters_before=parameters,
            parameters_after=self._count_parameters(),
        )
        self.records.append(record)
        return self._judged(record)

    def _require_judge(self, loss: float | None) -> None:
        if loss is None and self.config.can_roll_back and not self.config.judged_by_evaluation:
            raise CalibrationError(
                f"rollback_tolerance is {self.config.rollback_tolerance:g}, but the calibration batches give no loss "
                "that a cut could be judged by. Give batches with labels, or a loss_function."
            )

    def _judged(self, record: CheckRecord) -> CheckRecord:
        if record.outcome != "cut" or self.config.judged_by_evaluation or self.snapshot is None:
            return record
        worse = record.loss_after - record.loss_before
        if worse <= self.config.rollback_tolerance:
            self.snapshot = None
            return record
        return self.take_back(
            f"the calibration loss rose by {worse:.4g}, allowed is {self.config.rollback_tolerance:g}", record.step
        )

    def take_back(self, reason: str, step: int | None = None) -> CheckRecord:
        """
        Put back what the latest cut replaced: weights, optimizer state, sizes and configs.

        Args:
            reason (`str`): Why, for the record.
            step (`int`, *optional*): The training step, for the record.

        Raises:
            `RuntimeError`: no snapshot is kept.
        """
        if self.snapshot is None:
            raise RuntimeError("there is no snapshot of a cut to go back to")
        start, parameters, sizes = time.perf_counter(), self._count_parameters(), self.sizes
        commit_together(self._changes(self.snapshot.reductions(self.layers)))
        roll_back_together(self._cut_copies)
        for name in self.snapshot.forms:
            self._scores.pop(name, None)
        self.snapshot = None
        layers = [
            LayerRecord(layer.name, layer.family, sizes[layer.name], layer.state_size, layer.state_size, [], 0.0, 0.0)
            for layer in self.layers
        ]
        record = CheckRecord(
            outcome="rolled_back",
            reason=reason,
            layers=layers,
            step=step,
            seconds=time.perf_counter() - start,
            parameters_before=parameters,
            parameters_after=self._count_parameters(),
        )
        self.records.append(record)
        return record

    def restore(self, records: Sequence[CheckRecord], snapshot: Snapshot | None = None) -> None:
        """
        Go on from the records of an interrupted run.

        Args:
            records (`Sequence[CheckRecord]`): The records up to the checkpoint that the model was loaded from.
            snapshot ([`Snapshot`], *optional*): What the latest cut replaced, where it was still to be judged.
        """
        self.records = list(records)
        self.snapshot = snapshot
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
        commit_together(self._changes(layers.reductions(self.layers)))

    def skip(self, reason: str, step: int | None = None) -> CheckRecord:
        """Record that a check could not be completed and that nothing was changed."""
        parameters = self._count_parameters()
        record = CheckRecord("skipped", reason, step=step, parameters_before=parameters, parameters_after=parameters)
        self.records.append(record)
        return record

    def _carry_out(
        self, plan: dict[str, LayerPlan], calibration: Calibration, batches: Sequence[Any], seed: int
    ) -> _Result:
        if not any(layer.is_cut for layer in plan.values()):
            wanted, size = max(layer.wanted for layer in plan.values()), max(layer.size for layer in plan.values())
            return _Result("kept", f"the spectra ask for {wanted} of {size} states", calibration.loss)
        truncations, reductions, failures = self._prepare(plan, calibration, seed)
        if failures and (self.config.uniform or not reductions):
            self._processes.agree("how to cut", {"failures": failures})
            return _Result("skipped", f"a truncation failed its checks: {'; '.join(failures)}", calibration.loss)
        facts = {name: truncation.fingerprint() for name, truncation in truncations.items()}
        self._processes.agree("how to cut", {**facts, "failures": failures})
        snapshot = self._snapshot(reductions)
        self._cut_copies = copy_changes(self._find_copies(), self.model, self.layers, truncations)
        changes = [*self._changes(reductions), *self._cut_copies]
        commit_together(changes)
        try:
            loss_after = None if calibration.loss is None else self._loss(batches)
        except BaseException:
            roll_back_together(changes)
            raise
        if loss_after is not None and not math.isfinite(loss_after):
            roll_back_together(changes)
            return _Result("skipped", f"the loss after the cut was {loss_after}; the cut was taken back", None)
        self.snapshot = snapshot
        if snapshot is None:
            self._cut_copies = []
        reason = "the spectra allow it" if not failures else f"some layers stay as they are: {'; '.join(failures)}"
        return _Result("cut", reason, loss_after, truncations)

    def _prepare(
        self, plan: dict[str, LayerPlan], calibration: Calibration, seed: int
    ) -> tuple[dict[str, Truncation], list[LayerReduction], list[str]]:
        """The truncations and reductions of the layers that are to be cut, and why the others failed."""
        cut = [layer for layer in self._chosen if layer.name in plan and plan[layer.name].is_cut]
        sizes = {layer.name: plan[layer.name].new_size for layer in cut}
        truncations, failed = find_truncations(
            calibration.gramians, sizes, self._reductors, self.config, seed, self._processes, self._progress
        )
        reductions = []
        for layer in [layer for layer in cut if layer.name in truncations]:
            try:
                reductions.append(layer.reduce(truncations[layer.name]))
            except TruncationError as error:
                failed[layer.name] = str(error)
                del truncations[layer.name]
        return truncations, reductions, [f"{name}: {message}" for name, message in failed.items()]

    def _changes(self, reductions: Sequence[LayerReduction]) -> list[Change]:
        model_change = ModelChange(self.model, reductions, all_changes(self.model, self.layers, reductions))
        changes: list[Change] = [model_change]
        if self._optimizer is not None:
            changes.append(OptimizerChange.of(self._optimizer, model_change, self.config.optimizer_moments))
        followers = [follow(model_change.parameters) for follow in self._followers]
        return [*map(UndoneLast, followers), *changes, *map(DoneLast, followers)]

    def _snapshot(self, reductions: Sequence[LayerReduction]) -> Snapshot | None:
        if not self.config.can_roll_back:
            return None
        replaced = [change.old for reduction in reductions for change in reduction.parameters]
        return Snapshot.of([reduction.layer for reduction in reductions], self._optimizer, only=replaced)

    def _loss(self, batches: Sequence[Any]) -> float:
        return evaluate_loss(self.model, batches, self._loss_function, self._processes.sum)

    def _layer_records(
        self,
        plan: dict[str, LayerPlan],
        result: _Result,
        spectra: dict[str, Tensor],
        correlations: dict[str, float | None],
        lost: dict[str, float | None],
    ) -> list[LayerRecord]:
        records = []
        for layer in [layer for layer in self._chosen if layer.name in plan]:
            sigma, layer_plan = spectra[layer.name], plan[layer.name]
            size_after = layer_plan.new_size if layer.name in result.truncations else layer_plan.size
            tail, total = float(sigma[size_after:].sum()), float(sigma.sum())
            records.append(
                LayerRecord(
                    name=layer.name,
                    family=layer.family,
                    size_before=layer_plan.size,
                    size_after=size_after,
                    wanted_size=layer_plan.wanted,
                    hankel_singular_values=sigma.tolist(),
                    tail=tail,
                    tail_share=tail / total if total else 0.0,
                    rank_correlation=correlations[layer.name],
                    state_scores=self._scores[layer.name].tolist(),
                    lost_energy=lost.get(layer.name),
                )
            )
        return records

    def _count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class _Result:
    outcome: str
    reason: str
    loss_after: float | None
    truncations: dict[str, Truncation] = field(default_factory=dict)


def _combined_seed(seed: int, step: int | None) -> int:
    """One seed for every (run, step), so that a resumed run draws what the uninterrupted one draws."""
    return (seed * 1_000_003 + (0 if step is None else step)) % 2**63
