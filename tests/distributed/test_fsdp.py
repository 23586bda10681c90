"""Cuts between the segments of an FSDP run, in real processes over gloo, against the same training in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from .processes import largest_difference, launch, result

SHARDED = {"full": "mamba", "mixed": "mamba2", "twice_in_shards": "twice", "own_loss": "own_loss", "gated": "gated"}

LOAD_WITHOUT_THE_LIBRARY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_compressm", "numba"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, folder + "/loaded.pt")
    print(type(model).__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    run = launch(path, (*SHARDED, "lru", "without_moments", "without_segments"), 2, "fsdp_worker.py")
    assert run.returncode == 0, run.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", SHARDED)
def test_segments_end_as_one_process_that_is_cut_in_place(folder: Path, alone: Path, case: str) -> None:
    found, expected = result(folder, case, 2, 0), result(alone, SHARDED[case], 1, 0)
    assert found["sharded"] == len(found["parameters"])
    assert found["sizes"] == expected["sizes"]
    # Rounding grows from step to step where keys are normed.
    slack = 1e-3 if case == "gated" else 1e-5
    assert found["losses"] == pytest.approx(expected["losses"], abs=slack)
    assert largest_difference(found, expected) < 5 * slack
    assert largest_difference(found, result(folder, case, 2, 1)) == 0
    assert [record[0] for record in found["records"]] == [record[0] for record in expected["records"]]
    for record, other in zip(found["records"], expected["records"]):
        assert record[1:] == pytest.approx(other[1:], abs=slack)


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


@pytest.mark.parametrize("case", ["mixed", "lru"])
def test_what_fsdp_saves_of_a_model_with_its_own_code_loads_without_the_library(folder: Path, case: str) -> None:
    trained, run = result(folder, case, 2, 0), folder / f"{case}-2"
    assert trained["class"].startswith("FSDP"), "training goes on with the class that FSDP gives"
    folders = [str(run / "saved"), str(run / "checkpoint-6"), str(run / "checkpoint-9")]
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_LIBRARY, *folders]
    loading = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert loading.returncode == 0, loading.stderr[-4000:]
    assert loading.stdout.split() == [trained["class"].removeprefix("FSDP")] * 3
    for path in (folders[0], folders[-1]):
        loaded = torch.load(Path(path) / "loaded.pt")
        assert loaded.keys() == trained["parameters"].keys()
        assert all(torch.equal(loaded[name], parameter) for name, parameter in trained["parameters"].items())


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
