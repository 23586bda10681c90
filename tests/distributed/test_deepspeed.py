"""Cuts between the segments of a DeepSpeed run, two processes over gloo, against the same training in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from .processes import largest_difference, launch, result

# DeepSpeed compiles its communication for the CPU at its first use; `make test-deepspeed` installs it.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

EXPECTED = {
    "zero1": "mamba", "zero2_twice": "twice", "zero3": "mamba", "zero3_twice": "twice", "zero2_mixed": "mamba2",
    "arguments_once": "twice",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("deepspeed")
    cases = (*EXPECTED, "without_moments", "partitioned", "own_optimizer", "alone")
    run = launch(path, cases, 2, "deepspeed_worker.py", DS_ACCELERATOR="cpu")
    assert run.returncode == 0, run.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", EXPECTED)
def test_segments_end_as_one_process_that_is_cut_in_place(folder: Path, alone: Path, case: str) -> None:
    found, expected = result(folder, case, 2, 0), result(alone, EXPECTED[case], 1, 0)
    assert found["sizes"] == expected["sizes"]
    # A matrix that the cut brings has no step count of its own here, so that its first steps are a little smaller.
    tolerance = 1e-3 if "mixed" in case else 1e-5
    assert found["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert largest_difference(found, expected) < (2e-2 if "mixed" in case else 5e-5)
    assert largest_difference(found, result(folder, case, 2, 1)) == 0
    for record, other in zip(found["records"], expected["records"], strict=True):
        assert record[0] == other[0] and record[1:] == pytest.approx(other[1:], abs=1e-5)


def test_a_cut_that_forgets_the_moments_ends_elsewhere(folder: Path, alone: Path) -> None:
    assert largest_difference(result(folder, "without_moments", 2, 0), result(alone, "mamba", 1, 0)) > 1e-3


@pytest.mark.parametrize("case", ["zero1", "zero3"])
def test_every_checkpoint_loads_at_the_size_after_its_cut(folder: Path, case: str) -> None:
    checkpoints = sorted((folder / f"{case}-2").glob("*checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-6", "checkpoint-9"]
    trained = result(folder, case, 2, 0)["parameters"]
    for path in checkpoints:
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert loaded.config.state_size == 4
    assert all(torch.allclose(tensor, trained[name]) for name, tensor in loaded.named_parameters())


def test_what_segments_cannot_do_is_refused_with_the_way_out(folder: Path) -> None:
    assert "load the model before" in result(folder, "partitioned", 2, 0)["error"]
    assert "optimizer in the DeepSpeed config" in result(folder, "own_optimizer", 2, 0)["error"]
    assert "train_in_segments()" in result(folder, "alone", 2, 0)["error"]
