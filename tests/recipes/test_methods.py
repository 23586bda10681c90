"""Each method for a few steps on a tiny model, through the plain Trainer."""

from __future__ import annotations

import json

import pytest
import torch
from experiments.distillation import DistillationLoss, DistillationTrainer
from experiments.methods import METHODS, Run, compression_config
from experiments.models import FAMILIES, build_model, state_sizes
from experiments.runs import RunSettings, execute
from torch.nn import functional


@pytest.fixture
def run(tiny, digits, tmp_path):
    def build(method: str, final_state_size: int | None = 4, seed: int = 0, **overrides) -> Run:
        folder = tmp_path / f"{method}-run"
        return Run(tiny(**overrides), digits, method, seed, folder, final_state_size)

    return build


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_its_size(method, run) -> None:
    outcome = METHODS[method](run(method))
    assert state_sizes(outcome.model) == [16 if method == "full" else 4]
    assert outcome.cost.seconds > 0
    assert outcome.cost.cpu_seconds > 0
    assert outcome.extra.seconds <= outcome.cost.seconds
    cuts = [record for record in outcome.records if record.outcome == "cut"]
    assert len(cuts) == (1 if method in ("compressm", "post_training", "hankel_regularization") else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_tested(family, tiny, digits, tmp_path) -> None:
    settings = tiny(**{"model.name": family, "model.state_size": 8, "training.max_steps": 2})
    result = execute(RunSettings(settings, "scratch", 0, 4), digits, tmp_path)
    assert (result.model, result.final_state_size) == (family, 4)
    assert 0 <= result.accuracy <= 1


@pytest.mark.parametrize("family", ["lru", "s4d", "mamba"])
def test_every_family_is_cut_in_training(family, tiny, digits, tmp_path) -> None:
    settings = tiny(**{"model.name": family, "model.state_size": 8})
    result = execute(RunSettings(settings, "compressm", 0, 4), digits, tmp_path)
    assert (result.initial_state_size, result.final_state_size) == (8, 4)
    assert 0 < result.extra_seconds < result.seconds


def test_the_training_learns(tiny, tmp_path) -> None:
    from experiments.data import load_data

    settings = tiny(
        **{"data.train_examples": 1400, "training.max_steps": 250, "training.learning_rate": 0.02, "model.dropout": 0.0}
    )
    result = execute(RunSettings(settings, "full", 0), load_data(settings.data), tmp_path)
    assert result.accuracy > 0.4, "ten classes"


def test_the_full_size_model_is_trained_once(run) -> None:
    first = METHODS["full"](run("full"))
    costs = list(run("full").output_dir.parent.glob("models/full-*/cost.json"))
    assert len(costs) == 1
    second = METHODS["full"](run("full"))
    assert second.cost == first.cost
    for ours, theirs in zip(first.model.state_dict().values(), second.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    student = METHODS["distillation"](run("distillation"))
    assert student.extra == first.cost
    assert student.cost.seconds > first.cost.seconds, "the teacher's training is counted"
    METHODS["full"](run("full", seed=1))
    METHODS["hankel_regularization"](run("hankel_regularization"))
    assert len(list(run("full").output_dir.parent.glob("models/*/cost.json"))) == 3


def test_an_interrupted_training_is_not_taken_for_a_trained_model(run) -> None:
    METHODS["full"](run("full"))
    (costs,) = run("full").output_dir.parent.glob("models/full-*/cost.json")
    costs.unlink()
    METHODS["full"](run("full"))
    assert json.loads(costs.read_text())["training"]["seconds"] > 0


def test_the_same_seed_starts_all_methods_alike(run) -> None:
    ours, theirs = run("compressm").build(16), run("full").build(16)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    other = run("full", seed=1).build(16)
    assert not all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values()))


def test_a_cut_by_tolerance_needs_no_size(run) -> None:
    outcome = METHODS["compressm"](run("compressm", None, **{"compression.tolerance": 0.3}))
    (record,) = outcome.records
    assert record.layers[0].size_after == state_sizes(outcome.model)[0] < 16


@pytest.mark.parametrize("family", ["lru", "mamba"])
def test_sizes_per_layer_where_the_family_can_hold_them(family, tiny, digits, tmp_path) -> None:
    overrides = {"model.name": family, "model.num_hidden_layers": 2, "compression.uniform": False}
    run = Run(tiny(**overrides), digits, "compressm", 0, tmp_path / "run")
    assert compression_config(run.settings).uniform is (family == "mamba")
    model = METHODS["compressm"](run).model
    assert isinstance(model.config.state_size, int) or len(model.config.state_size) == 2
    if family == "mamba":
        assert isinstance(model.config.state_size, int)


@pytest.mark.parametrize("rule", ["smallest", "random"])
def test_ablations_keep_other_states(rule, run) -> None:
    selection = {"compression.strategy": "fixed", "compression.reductor": "selection"}
    largest = METHODS["compressm"](run("compressm", None, **selection))
    other = run("compressm", None, **selection, **{"compression.selection_rule": rule})
    outcome = METHODS["compressm"](other)
    assert state_sizes(outcome.model) == state_sizes(largest.model) == [8]
    assert outcome.records[0].loss_after != pytest.approx(largest.records[0].loss_after, rel=1e-6)


@pytest.mark.parametrize("method", ["scratch", "distillation"])
def test_small_models_need_a_size(method, run) -> None:
    with pytest.raises(ValueError, match="needs --final-state-size"):
        METHODS[method](run(method, None))


def test_the_distillation_loss_by_its_definition() -> None:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    soft = functional.softmax(teacher / 3, -1)
    divergence = (soft * (soft.log() - functional.log_softmax(student / 3, -1))).sum(-1).mean()
    found = DistillationLoss(temperature=3, weight=0.25)(student, teacher, torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(found, 0.75 * 2 + 0.25 * 9 * divergence)
    with pytest.raises(ValueError, match="temperature is 0"):
        DistillationLoss(temperature=0)
    with pytest.raises(ValueError, match="weight is 2"):
        DistillationLoss(weight=2)


def test_the_teacher_stays_as_it_is(run) -> None:
    small = run("distillation")
    teacher, student = small.build(16), small.build(4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    small.train(
        student, trainer_class=DistillationTrainer, teacher=teacher, distillation_loss=DistillationLoss(weight=1.0)
    )
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not torch.equal(small.build(4).head.score.weight, student.head.score.weight), "the student has learnt"


def test_an_unknown_family_is_refused(digits) -> None:
    with pytest.raises(ValueError, match="choose one of lru, s4d, mamba, mamba2"):
        build_model({"name": "transformer"}, digits, 4)
