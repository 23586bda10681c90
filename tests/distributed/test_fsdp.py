"""Cuts between the segments of an FSDP run, in real processes over gloo, against the same training in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from .processes import largest_difference, launch, result

SHARDED = {"full": "mamba", "mixed": "mamba2", "twice_in_shards": "twice"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    run = launch(path, (*SHARDED, "without_moments", "without_segments"), 2, "fsdp_worker.py")
    assert run.returncode == 0, run.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", SHARDED)
def test_segments_end_as_one_process_that_is_cut_in_place(folder: Path, alone: Path, case: str) -> None:
    found, expected = result(folder, case, 2, 0), result(alone, SHARDED[case], 1, 0)
    assert found["sharded"] == len(found["parameters"])
    assert found["sizes"] == expected["sizes"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert largest_difference(found, expected) < 5e-5
    assert largest_difference(found, result(folder, case, 2, 1)) == 0
    assert [record[0] for record in found["records"]] == [record[0] for record in expected["records"]]
    for record, other in zip(found["records"], expected["records"]):
        assert record[1:] == pytest.approx(other[1:], abs=1e-5)


def test_a_cut_that_forgets_the_moments_ends_elsewhere(folder: Path, alone: Path) -> None:
    assert largest_difference(result(folder, "without_moments", 2, 0), result(alone, "mamba", 1, 0)) > 1e-3


def test_checks_are_logged_once_by_the_segment_that_follows(folder: Path) -> None:
    assert result(folder, "full", 2, 0)["logged"] == [6]
    assert result(folder, "twice_in_shards", 2, 0)["logged"] == [3, 6]
    history = json.loads((folder / "twice_in_shards-2" / "compressm_history.json").read_text())
    assert [check["step"] for check in history["checks"]] == [3, 6]


def test_every_checkpoint_loads_at_the_size_after_its_cut(folder: Path) -> None:
    checkpoints = sorted((folder / "full-2").glob("*checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-6", "checkpoint-9"]
    for path in checkpoints:
        assert AutoModelForCausalLM.from_pretrained(path).config.state_size == 4
    trained, loaded = result(folder, "full", 2, 0), AutoModelForCausalLM.from_pretrained(checkpoints[-1])
    assert all(torch.equal(p, trained["parameters"][name]) for name, p in loaded.named_parameters())


def test_the_callback_alone_refuses_fsdp_and_names_the_way(folder: Path) -> None:
    assert "train_in_segments()" in result(folder, "without_segments", 2, 0)["error"]


def test_a_run_killed_while_its_cut_is_written_is_resumed(folder: Path, alone: Path) -> None:
    run = launch(folder, ("killed",), 2, "fsdp_worker.py")
    assert run.returncode != 0 and "SIGKILL" in run.stderr, run.stderr[-4000:]
    left = sorted(path.name for path in (folder / "killed-2").glob("*checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-6", "unfinished-checkpoint-6"]
    run = launch(folder, ("relaunched",), 2, "fsdp_worker.py")
    assert run.returncode == 0, run.stderr[-4000:]
    assert largest_difference(result(folder, "relaunched", 2, 0), result(alone, "twice", 1, 0)) < 5e-5
    assert not list((folder / "killed-2").glob("unfinished-*"))
