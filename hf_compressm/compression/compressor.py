"""One check from beginning to end: calibrate, decide, cut all layers or none, verify, record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import ParameterChange, SumOverProcesses, fast_cpu_scan, find_layers
from ..config import CompreSSMConfig
from ..errors import TruncationError, UnsupportedModelError
from ..systems import Truncation, diagonal_hankel_scores, rank_correlation
from .apply import Change, ModelChange, commit_together, roll_back_together
from .calibration import Calibration, LossFunction, calibrate, evaluate_loss
from .plan import LayerPlan, plan_reduction
from .record import CheckRecord, LayerRecord
from .truncate import truncate

Follow = Callable[[Sequence[ParameterChange]], Change]
"""Prepares what has to change beside the model (an optimizer, a wrapper) when parameters are replaced."""


class Compressor:
    """
    Cuts the state of a model's layers, check by check, and remembers what it did.

    Args:
        model (`torch.nn.Module`): The model; it is changed in place.
        config ([`CompreSSMConfig`]): What to cut and how.
        loss_function (`Callable`, *optional*): Takes the model and a batch and returns the scalar loss; the model's own
            loss when unset.
        followers (`Sequence[Follow]`, *optional*): What else changes together with the model, for example
            `lambda changes: OptimizerChange(optimizer, changes)`.
        sum_over_processes (`Callable`, *optional*): Adds a tensor over all processes.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no supported layer, one that cannot be cut, or one that cannot
            hold what the configuration asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompreSSMConfig,
        loss_function: LossFunction | None = None,
        followers: Sequence[Follow] = (),
        sum_over_processes: SumOverProcesses | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = find_layers(model)
        self.records: list[CheckRecord] = []
        self._loss_function = loss_function
        self._followers = list(followers)
        self._sum_over_processes = sum_over_processes
        self._progress = progress
        self._scores: dict[str, Tensor] = {}
        self._require_supported()

    def _require_supported(self) -> None:
        for layer in self.layers:
            if self.config.reductor not in layer.reductors:
                raise UnsupportedModelError(
                    f"{layer.name} ({layer.family}) cannot hold what the reductor {self.config.reductor!r} gives; "
                    f"choose one of {', '.join(sorted(layer.reductors))}."
                )
        fixed = [layer.name for layer in self.layers if not layer.sizes_may_differ]
        if not self.config.uniform and len(self.layers) > 1 and fixed:
            raise UnsupportedModelError(
                f"uniform=False would give each layer its own state size, which the checkpoint of {fixed[0]} "
                f"({self.layers[0].family}) cannot hold. Leave uniform=True."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The present state size of each layer, by its name."""
        return {layer.name: layer.state_size for layer in self.layers}

    def check(self, batches: Sequence[Any], step: int | None = None) -> CheckRecord:
        """
        Calibrate on the batches and cut where the configuration asks for it.

        Args:
            batches (`Sequence`): Inputs of the model; they are run up to twice.
            step (`int`, *optional*): The training step, for the record and for the seeds.

        Returns:
            [`CheckRecord`]: What was seen and done; it is also appended to `records`.

        Raises:
            [`~errors.CalibrationError`]: the batches give no finite loss or Gramians. Nothing was changed.
        """
        start = time.perf_counter()
        seed = _combined_seed(self.config.seed, step)
        parameters = self._count_parameters()
        with fast_cpu_scan(self.config.fast_cpu_scan):
            calibration = calibrate(
                self.model,
                self.layers,
                batches,
                gramians=self.config.gramians,
                loss_function=self._loss_function,
                sum_over_processes=self._sum_over_processes,
                seed=seed,
                progress=self._progress,
            )
            spectra = {name: gramians.hankel_singular_values() for name, gramians in calibration.gramians.items()}
            plan = plan_reduction(spectra, self.sizes, self.config)
            result = self._carry_out(plan, calibration, batches, seed)
        record = CheckRecord(
            outcome=result.outcome,
            reason=result.reason,
            layers=self._layer_records(plan, result, spectra, calibration),
            step=step,
            loss_before=calibration.loss,
            loss_after=result.loss_after,
            seconds=time.perf_counter() - start,
            parameters_before=parameters,
            parameters_after=self._count_parameters(),
        )
        self.records.append(record)
        return record

    def restore(self, records: Sequence[CheckRecord]) -> None:
        """
        Go on from the records of an interrupted run.

        Args:
            records (`Sequence[CheckRecord]`): The records up to the checkpoint that the model was loaded from.
        """
        self.records = list(records)
        known = [record for record in records if record.layers]
        for layer in known[-1].layers if known else []:
            self._scores[layer.name] = torch.tensor(layer.state_scores, dtype=torch.float64)

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
            wanted, size = max(layer.wanted for layer in plan.values()), max(self.sizes.values())
            return _Result("kept", f"the spectra ask for {wanted} of {size} states", calibration.loss)
        try:
            truncations = self._truncations(plan, calibration, seed)
            reductions = [layer.reduce(truncations[layer.name]) for layer in self.layers if layer.name in truncations]
        except TruncationError as error:
            return _Result("skipped", f"a truncation failed its checks: {error}", calibration.loss)
        model_change = ModelChange(self.model, reductions)
        changes = [model_change, *(follow(model_change.parameters) for follow in self._followers)]
        commit_together(changes)
        try:
            loss_after = None if calibration.loss is None else self._loss(batches)
        except BaseException:
            roll_back_together(changes)
            raise
        if loss_after is not None and not math.isfinite(loss_after):
            roll_back_together(changes)
            return _Result("skipped", f"the loss after the cut was {loss_after}; the cut was taken back", None)
        return _Result("cut", "the spectra allow it", loss_after, truncations)

    def _truncations(self, plan: dict[str, LayerPlan], calibration: Calibration, seed: int) -> dict[str, Truncation]:
        return {
            name: truncate(calibration.gramians[name], layer.new_size, self.config, seed=seed + number)
            for number, (name, layer) in enumerate(plan.items())
            if layer.is_cut
        }

    def _loss(self, batches: Sequence[Any]) -> float:
        return evaluate_loss(self.model, batches, self._loss_function, self._sum_over_processes)

    def _layer_records(
        self, plan: dict[str, LayerPlan], result: _Result, spectra: dict[str, Tensor], calibration: Calibration
    ) -> list[LayerRecord]:
        records = []
        for layer in self.layers:
            sigma, truncation = spectra[layer.name], result.truncations.get(layer.name)
            size_after = plan[layer.name].new_size if truncation is not None else plan[layer.name].size
            tail, total = float(sigma[size_after:].sum()), float(sigma.sum())
            scores = diagonal_hankel_scores(calibration.gramians[layer.name].P, calibration.gramians[layer.name].Q)
            # Only the states that stay can be compared with those of the next check.
            stay = scores if truncation is None else scores[truncation.indices]
            previous = self._scores.get(layer.name)
            self._scores[layer.name] = stay.cpu()
            records.append(
                LayerRecord(
                    name=layer.name,
                    family=layer.family,
                    size_before=plan[layer.name].size,
                    size_after=size_after,
                    wanted_size=plan[layer.name].wanted,
                    hankel_singular_values=sigma.tolist(),
                    tail=tail,
                    tail_share=tail / total if total else 0.0,
                    rank_correlation=None if previous is None else _correlation(previous, scores.cpu()),
                    state_scores=stay.tolist(),
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


def _correlation(previous: Tensor, scores: Tensor) -> float | None:
    if len(scores) < 2 or len(previous) != len(scores):
        return None
    return float(rank_correlation(previous, scores))


def _combined_seed(seed: int, step: int | None) -> int:
    """One seed for every (run, step), so that a resumed run draws what the uninterrupted one draws."""
    return (seed * 1_000_003 + (0 if step is None else step)) % 2**63
