"""
Folders that version 0.1.0 saved load, resume and roll back as they did then.

Only public names are used here and where the folders were written, so that the proof holds while the code inside moves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback

import hf_compressm.models  # noqa: F401 (the Auto classes learn of the models)
from hf_compressm import CompreSSMConfig, analyze, compress, read_history
from tests.fixtures.make_saved_by_0_1 import FOLDER, MODELS, RUNS, Run, continued, form_of, logits_of

EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
PLACES = {**{saved.name: saved for saved in MODELS}, **{run.checkpoint: run for run in RUNS}}
CUT = {"compressed_mamba": 1, "compressed_mamba2": 1, **{run.checkpoint: run.stopped_at // 5 for run in RUNS}}
JUDGED = [run for run in RUNS if run.awaits_judgement]

# What processors and versions of torch may differ by.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

WITHOUT_THE_LIBRARY = """
import json, pathlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_compressm", "numba"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch, transformers
for folder, auto_class, expected in json.load(sys.stdin):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    carries_code = any(pathlib.Path(folder).glob("modeling_*.py"))
    assert type(model).__module__.startswith("transformers_modules") == carries_code, folder
    with torch.no_grad():
        found = model(**{name: torch.tensor(rows) for name, rows in expected["inputs"].items()}).logits
    difference = (found - torch.tensor(expected["logits"])).abs().max().item()
    assert difference < 1e-5, (folder, difference)
    print(type(model).__name__)
assert not any(name.split(".")[0] == "hf_compressm" for name in sys.modules)
"""


def told_of(place: str) -> dict:
    """What version 0.1.0 computed with a folder."""
    return EXPECTED[place.split("/")[0]]


def load(place: str) -> PreTrainedModel:
    """The model in a folder, as the library loads it."""
    return getattr(transformers, PLACES[place].auto_class).from_pretrained(FOLDER / place).eval()


def in_a_process(*command: str, folder: Path, **settings) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, without a network and with a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False, **settings}
    return subprocess.run([sys.executable, *command], **settings)


@pytest.mark.parametrize("place", PLACES)
def test_the_library_loads_the_folder_and_computes_the_same(place: str) -> None:
    model, expected = load(place), told_of(place)
    assert type(model).__module__.split(".")[0] in ("hf_compressm", "transformers")
    assert form_of(model) == expected["form"]
    inputs = {name: torch.tensor(rows) for name, rows in expected["inputs"].items()}
    torch.testing.assert_close(logits_of(model, inputs), torch.tensor(expected["logits"]), **CLOSE)


def test_the_folders_need_no_library(tmp_path) -> None:
    # A checkpoint of a run is a model too.
    shutil.copytree(FOLDER, tmp_path / "saved")
    folders = [[str(tmp_path / "saved" / place), PLACES[place].auto_class, told_of(place)] for place in PLACES]
    run = in_a_process("-c", WITHOUT_THE_LIBRARY, folder=tmp_path, input=json.dumps(folders))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [told_of(place)["form"]["class"] for place in PLACES]


def known_fields(values: dict, known: dict) -> dict:
    """The fields that an earlier version wrote, of the layers too."""
    kept = {name: values[name] for name in known}
    if "layers" in known:
        kept["layers"] = [known_fields(*pair) for pair in zip(values["layers"], known["layers"], strict=True)]
    return kept


@pytest.mark.parametrize("place, cuts", CUT.items())
def test_the_history_and_the_settings_are_read(place: str, cuts: int) -> None:
    records = read_history(FOLDER / place)
    written = json.loads((FOLDER / place / "compressm_history.json").read_text(encoding="utf-8"))
    # No field was lost, and none has another meaning; later ones are at their defaults.
    assert [known_fields(record.to_dict(), check) for record, check in zip(records, written["checks"])] == (
        written["checks"]
    )
    assert len(records) == len(written["checks"])
    assert [record.outcome for record in records] == ["cut"] * cuts
    form = told_of(place)["form"]
    sizes = form.get("state_sizes") or [form["state_size"]] * len(records[-1].layers)
    assert [layer.size_after for layer in records[-1].layers] == sizes
    settings = json.loads((FOLDER / place / "compressm_config.json").read_text(encoding="utf-8"))
    assert known_fields(CompreSSMConfig.from_pretrained(FOLDER / place).to_dict(), settings) == settings


@pytest.mark.parametrize("place", PLACES)
def test_what_was_saved_is_cut_further(place: str, tmp_path) -> None:
    model = load(place)
    batch = PLACES[place].batch(4, 4)
    before = {name: len(sigma) for name, sigma in analyze(model, [batch], progress=False).sigma.items()}
    record = compress(model, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=0.5), progress=False)
    assert record.outcome == "cut" and {layer.name: layer.size_before for layer in record.layers} == before
    model.save_pretrained(tmp_path)
    again = getattr(transformers, PLACES[place].auto_class).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch))


def test_the_command_line_goes_on_with_the_history(tmp_path) -> None:
    arguments = ["compress", str(FOLDER / "run_lru/checkpoint-6"), "--output", "smaller", "--ratio", "0.5", "--quiet"]
    run = in_a_process("-m", "hf_compressm", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    earlier, further = read_history(FOLDER / "run_lru/checkpoint-6"), read_history(tmp_path / "smaller")
    assert further[: len(earlier)] == earlier
    assert [layer.size_after for record in further for layer in record.layers] == [4, 4, 2, 2]


def as_then(run: Run) -> Run:
    """The run with the Gramians that version 0.1.0 took: in closed form for time-invariant layers, without a choice."""
    return replace(run, settings={**run.settings, "gramians": "closed_form"}) if run.name == "run_lru" else run


def assert_same_course(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Whether a run took the course that it took under version 0.1.0."""
    assert found["outcomes"] == expected["outcomes"] and found["form"] == expected["form"]
    for name in ("losses", "loss_after_cuts"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    logits = torch.tensor(found["logits"]), torch.tensor(expected["logits"])
    torch.testing.assert_close(*logits, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_goes_on_from_its_checkpoint(run, tmp_path) -> None:
    found = continued(as_then(run), FOLDER, tmp_path / "run", 1.0)
    # A cut LRU has another scale between gamma and C than it had then, so that the steps behind a cut are longer.
    assert_same_course(found, EXPECTED[run.name]["judged_good"], 3e-3 if run.name == "run_lru" else 1e-5)


class StateAfterJudgement(TrainerCallback):
    """Keeps the weights and the optimizer's moments that the model has once the first evaluation was judged."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.tensors:
            return
        moments = getattr(optimizer, "optimizer", optimizer).state
        for name, parameter in model.named_parameters():
            self.tensors[f"parameter:{name}"] = parameter.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                self.tensors[f"state:{key}:{name}"] = moments[parameter][key].clone()


@pytest.mark.parametrize("run", JUDGED, ids=lambda run: run.name)
def test_a_cut_that_awaits_its_judgement_is_taken_back(run, tmp_path) -> None:
    after = StateAfterJudgement()
    found = continued(run, FOLDER, tmp_path / "run", 0.0, after)
    assert found["outcomes"][-1] == [run.stopped_at + 1, "rolled_back"]
    held = load_file(FOLDER / run.checkpoint / "compressm_snapshot.safetensors")
    # A step counter goes on counting.
    for name, tensor in held.items():
        if not name.startswith("state:step:"):
            assert torch.equal(after.tensors[name], tensor), name
    assert_same_course(found, EXPECTED[run.name]["judged_bad"])
