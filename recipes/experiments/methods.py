"""The methods that the recipes compare, each on the plain Trainer: `METHODS[name](run)` trains and returns a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_compressm import CheckRecord, CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.consistency import without_ignored

from .cost import Cost, Stopwatch
from .data import SequenceData
from .distillation import DistillationLoss, DistillationTrainer
from .hankel import HankelPenalty, HankelTrainer
from .models import FAMILIES_WITH_SIZES_PER_LAYER, build_model
from .settings import ExperimentSettings
from .training import seeded, train

CALIBRATION_SEQUENCES = 64


@dataclass(frozen=True)
class Run:
    """
    One method on one experiment with one seed.

    Args:
        settings ([`ExperimentSettings`]): The experiment.
        data ([`SequenceData`]): Its data.
        method (`str`): A name in [`METHODS`].
        seed (`int`): Decides the initial weights, the order of the data and dropout.
        output_dir (`Path`): For what the Trainer and the callback write.
        final_state_size (`int`, *optional*): What the state is cut to, or what a model is built with that is never cut.
            When unset, the `compression` settings decide where a cut happens.
    """

    settings: ExperimentSettings
    data: SequenceData
    method: str
    seed: int
    output_dir: Path
    final_state_size: int | None = None

    def build(self, state_size: int) -> PreTrainedModel:
        """A new model; the same seed and size give the same weights in every method."""
        seeded(self.seed)
        return build_model(self.settings.model, self.data, state_size)

    def train(self, model: PreTrainedModel, **arguments: Any) -> Cost:
        """Train a model in place; arguments are those of [`training.train`]."""
        return train(model, self.data, self.settings.training, self.seed, self.output_dir, **arguments)

    def small_size(self) -> int:
        """The final state size, for methods that cannot do without."""
        if self.final_state_size is None:
            raise ValueError(f"the method {self.method!r} needs --final-state-size.")
        return self.final_state_size

    def calibration_batch(self) -> dict[str, Any]:
        """Training sequences for a cut after training."""
        loader = DataLoader(self.data.train, batch_size=CALIBRATION_SEQUENCES, collate_fn=self.data.collator)
        return next(iter(loader))


@dataclass(frozen=True)
class Outcome:
    """
    What a method gives.

    Args:
        model (`PreTrainedModel`): Trained, at its final size.
        cost ([`Cost`]): Of everything that the method had to do, a teacher's training included.
        extra ([`Cost`]): The part of it that is not the training of the model itself: cuts, penalties, the teacher.
        records (`list[CheckRecord]`): Of the cuts.
    """

    model: PreTrainedModel
    cost: Cost
    extra: Cost = Cost()
    records: list[CheckRecord] = field(default_factory=list)


def full(run: Run) -> Outcome:
    """The full-size model, never cut."""
    model, cost, _ = _trained_once(run, "full")
    return Outcome(model, cost)


def scratch(run: Run) -> Outcome:
    """A model that has the final size from the start."""
    model = run.build(run.small_size())
    return Outcome(model, run.train(model))


def compressm(run: Run) -> Outcome:
    """CompreSSM (Chahine et al., 2026, arXiv 2510.02823): the full-size model is cut while it is trained."""
    model = run.build(run.settings.state_size)
    callback = CompreSSMCallback(compression_config(run.settings, run.final_state_size))
    cost = run.train(model, callbacks=[callback])
    seconds = sum(record.seconds for record in callback.records)
    return Outcome(model, cost, Cost(seconds, seconds), callback.records)


def post_training(run: Run) -> Outcome:
    """The full-size model is trained and then cut, with no training after it."""
    model, cost, _ = _trained_once(run, "full")
    record, cut = _cut_after_training(run, model)
    return Outcome(model, cost + cut, cut, [record])


def distillation(run: Run) -> Outcome:
    """A model of the final size learns from the full-size one, which is trained first; both are counted."""
    small = run.small_size()
    teacher, teaching, _ = _trained_once(run, "full")
    student = run.build(small)
    learning = run.train(
        student,
        trainer_class=DistillationTrainer,
        teacher=teacher,
        distillation_loss=DistillationLoss(**run.settings.distillation),
    )
    return Outcome(student, teaching + learning, teaching)


def hankel_regularization(run: Run) -> Outcome:
    """The full-size model is trained with a Hankel nuclear-norm penalty and then cut."""
    model, cost, penalty = _trained_once(run, "hankel_regularization")
    record, cut = _cut_after_training(run, model)
    return Outcome(model, cost + cut, penalty + cut, [record])


METHODS: dict[str, Callable[[Run], Outcome]] = {
    "full": full,
    "compressm": compressm,
    "scratch": scratch,
    "post_training": post_training,
    "distillation": distillation,
    "hankel_regularization": hankel_regularization,
}

_TRAINING = ("recipe", "data", "model", "training")
SECTIONS: dict[str, tuple[str, ...]] = {
    "full": _TRAINING,
    "compressm": (*_TRAINING, "compression"),
    "scratch": _TRAINING,
    "post_training": (*_TRAINING, "compression"),
    "distillation": (*_TRAINING, "distillation"),
    "hankel_regularization": (*_TRAINING, "hankel_regularization", "compression"),
}
"""The settings that each method's result depends on."""


def compression_config(settings: ExperimentSettings, final_state_size: int | None = None) -> CompreSSMConfig:
    """
    The callback's configuration from the `compression` settings.

    `checks` in them, a setting of the recipes alone, spreads so many checks evenly over the window and stands in for
    `interval`. A final state size asks for the strategy `"target"`, which reaches it in the last of the checks.

    Args:
        settings ([`ExperimentSettings`]): The experiment.
        final_state_size (`int`, *optional*): What the cuts lead to.
    """
    values = _compression(settings)
    checks = values.pop("checks", None)
    if checks is not None:
        start, end = values.get("window", CompreSSMConfig().window)
        # A window that ends above 1 is in steps already.
        steps = round((end - start) * (settings.training.max_steps if end <= 1 else 1), 6)
        # One check stands at the window's end.
        values["interval"] = None if checks == 1 else max(1, int(steps // checks))
    return _config(values, settings.state_size, final_state_size)


def _compression(settings: ExperimentSettings) -> dict[str, Any]:
    values = dict(settings.compression)
    if settings.model["name"] not in FAMILIES_WITH_SIZES_PER_LAYER:
        values["uniform"] = True
    return values


def _config(values: dict[str, Any], state_size: int, final_state_size: int | None) -> CompreSSMConfig:
    """A configuration that leads to the final state size, where there is one, and else follows the settings."""
    if final_state_size is None:
        return CompreSSMConfig(**without_ignored(values))
    if not 0 < final_state_size < state_size:
        raise ValueError(f"the final state size is {final_state_size}; give one between 1 and {state_size - 1}.")
    others = {name: value for name, value in values.items() if name not in ("strategy", "tolerance", "keep_ratio")}
    return CompreSSMConfig(**others, strategy="target", target_state_size=final_state_size)


def _cut_after_training(run: Run, model: PreTrainedModel) -> tuple[CheckRecord, Cost]:
    # The cut is made in one go, whatever the schedule of a cut in training is.
    schedule = ("checks", "interval", "window", "when_stable")
    values = {name: value for name, value in _compression(run.settings).items() if name not in schedule}
    config = _config(values, run.settings.state_size, run.final_state_size)
    batch = {name: tensor.to(model.device) for name, tensor in run.calibration_batch().items()}
    stopwatch = Stopwatch()
    with stopwatch:
        record = compress(model, [batch], config, progress=False)
    return record, stopwatch.cost


def _trained_once(run: Run, stage: str) -> tuple[PreTrainedModel, Cost, Cost]:
    """
    The full-size model of a stage, from disk where an earlier run left it, with what its training took then.

    Several runs begin with the same training: the full-size model is a teacher and is cut after training too.
    """
    sections = ["data", "model", "training", *(["hankel_regularization"] if stage != "full" else [])]
    folder = run.output_dir.parent / "models" / f"{stage}-{run.settings.fingerprint(*sections)}-seed{run.seed}"
    costs = folder / "cost.json"
    model = run.build(run.settings.state_size)
    if costs.exists():
        known = json.loads(costs.read_text(encoding="utf-8"))
        loaded = type(model).from_pretrained(folder)
        return loaded, Cost(**known["training"]), Cost(**known["penalty"])
    stopwatch = Stopwatch()
    arguments = {}
    if stage == "hankel_regularization":
        penalty = HankelPenalty(**run.settings.hankel_regularization)
        arguments = {"trainer_class": HankelTrainer, "penalty": penalty, "stopwatch": stopwatch}
    cost = run.train(model, **arguments)
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
        # Last, so that a folder with this file is complete.
        costs.write_text(json.dumps({"training": asdict(cost), "penalty": asdict(stopwatch.cost)}), encoding="utf-8")
    state.wait_for_everyone()
    return model, cost, stopwatch.cost
