"""Cuts under DistributedDataParallel, in real processes over gloo, against the same training in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import ALONE
from .processes import largest_difference, launch, result

TOGETHER = ("mamba", "mamba2", "lru", "no_unused", "accumulation", "static_graph", "watched", "compiled", "rolled_back")
TOGETHER += ("own_loss", "gated")
# One process would hold other steps out, and see the first ones judge its fit.
FITTED = ("lru_fitted", "mamba2_fitted")
TROUBLED = ("without_rebuild", "different_settings", "different_versions", "broken_process", "nan_process", "saving")
TROUBLED += ("other_rounding", "loss_in_one_process", "judged_apart", "trained_again", "power_sgd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    run = launch(path, TOGETHER + FITTED + TROUBLED, 2)
    assert run.returncode == 0, run.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", TOGETHER + FITTED)
def test_all_processes_end_with_the_same_parameters(folder: Path, case: str) -> None:
    first, second = (result(folder, case, 2, rank) for rank in (0, 1))
    assert first["sizes"] == second["sizes"] == ([8, 8] if case == "rolled_back" else [4, 4])
    assert largest_difference(first, second) == 0
    assert [record[0] for record in first["records"]] == [record[0] for record in second["records"]]


@pytest.mark.parametrize("case", TOGETHER)
def test_they_end_as_one_process_on_the_joint_batch(folder: Path, alone: Path, case: str) -> None:
    expected = result(alone, case if case in ALONE else "mamba", 1, 0)
    together = result(folder, case, 2, 0)
    assert together["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    if case != "lru":  # whose modes have a phase of their own, which rounding decides
        assert largest_difference(expected, together) < 5e-5
    for record, other in zip(together["records"], expected["records"]):
        # The descent to an orthonormal cut ends where rounding lets it.
        assert record[0] == other[0] and record[1:] == pytest.approx(other[1:], abs=1e-4)


@pytest.mark.parametrize("case", ["lru", "mamba2"])
def test_layers_are_fitted_to_what_all_processes_see(folder: Path, case: str) -> None:
    fitted, plain = (result(folder, name, 2, 0)["records"][-1] for name in (f"{case}_fitted", case))
    assert fitted[:2] == pytest.approx(plain[:2]) and fitted[2] != plain[2]


def test_without_a_new_reducer_the_processes_drift_apart(folder: Path) -> None:
    assert largest_difference(*(result(folder, "without_rebuild", 2, rank) for rank in (0, 1))) > 1e-4


def test_every_gradient_is_reduced_once_and_nothing_old_stays(folder: Path) -> None:
    found = result(folder, "watched", 2, 0)
    assert found["freed"] and found["stale"] == 0
    # One bucket a step, that of the parameters which the model has then.
    assert len(found["buckets"]) == 8 and found["buckets"][-1] == found["size"] < found["buckets"][0]


@pytest.mark.parametrize(
    ("case", "difference"),
    [("different_settings", "setting keep_ratio"), ("different_versions", "version of accelerate")],
)
def test_processes_that_differ_are_refused_in_every_process(folder: Path, case: str, difference: str) -> None:
    for rank in (0, 1):
        message = result(folder, case, 2, rank)["error"]
        assert message.startswith("DisagreementError") and f"process 1 in {difference}." in message


@pytest.mark.parametrize(("case", "reason"), [("broken_process", "scalar loss"), ("nan_process", "loss is nan")])
def test_trouble_in_one_process_lets_all_skip_the_check(folder: Path, case: str, reason: str) -> None:
    first, second = (result(folder, case, 2, rank) for rank in (0, 1))
    outcomes = [[record[0] for record in each["records"]] for each in (first, second)]
    assert outcomes[0] == outcomes[1] and set(outcomes[0]) == {"skipped"}
    assert "process 1" in first["reasons"][0] and reason in first["reasons"][0] and reason in second["reasons"][0]
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("case", ["other_rounding", "loss_in_one_process"])
def test_what_differs_between_processes_without_harm_is_settled(folder: Path, case: str) -> None:
    first, second = (result(folder, case, 2, rank) for rank in (0, 1))
    assert first["records"] == second["records"] and first["records"][0][0] == "cut"
    assert (first["records"][0][1] is None) == (case == "loss_in_one_process")
    assert first["sizes"] == second["sizes"] == [4, 4]
    assert largest_difference(first, second) == 0


def test_one_verdict_of_an_evaluation_holds_for_all(folder: Path) -> None:
    first, second = (result(folder, "judged_apart", 2, rank) for rank in (0, 1))
    assert [record[0] for record in first["records"]] == ["cut", "rolled_back"]
    assert first["reasons"] == second["reasons"] and first["sizes"] == second["sizes"] == [8, 8]
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("case", ["trained_again", "power_sgd"])
def test_what_a_wrapper_remembers_of_old_shapes_is_dropped(folder: Path, case: str) -> None:
    first, second = (result(folder, case, 2, rank) for rank in (0, 1))
    assert first["sizes"] == second["sizes"] == [4, 4]
    assert largest_difference(first, second) == 0


def test_a_run_resumes_with_another_number_of_processes(folder: Path) -> None:
    run = launch(folder, ("resumed",), 1, RESUME_FROM="saving", RESUME_STEP="7")
    assert run.returncode == 0, run.stderr[-4000:]
    resumed, whole = result(folder, "resumed", 1, 0), result(folder, "saving", 2, 0)
    assert resumed["sizes"] == whole["sizes"] == [4, 4]
    assert largest_difference(resumed, whole) < 5e-5


def test_a_process_that_dies_in_a_cut_ends_the_run_and_a_relaunch_resumes(folder: Path) -> None:
    run = launch(folder, ("dying",), 2)
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    checkpoints = sorted(path.name for path in (folder / "dying-2").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    run = launch(folder, ("resumed",), 2, RESUME_FROM="dying", RESUME_STEP="4")
    assert run.returncode == 0, run.stderr[-4000:]
    assert largest_difference(*(result(folder, "resumed", 2, rank) for rank in (0, 1))) == 0
    assert largest_difference(result(folder, "resumed", 2, 0), result(folder, "mamba", 2, 0)) < 5e-5
