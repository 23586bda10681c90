"""Real training on real data: the digits recipe, its table and its two processes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from hf_compressm import CompreSSMConfig, analyze, compress, fast_cpu_scan

RECIPE = Path(__file__).parents[2] / "recipes" / "digits"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE))
    try:
        import data
        import demo

        yield Namespace(data=data, demo=demo)
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A Mamba with 64 states that reads the digits, its calibration batch and a function that tests it."""
    torch.set_num_threads(1)
    with fast_cpu_scan():
        options = Namespace(seed=0, steps=250, state_size=64)
        model = recipe.demo.train(options, [], tmp_path_factory.mktemp("digits"))["model"]
        train_set, test_set = recipe.data.digit_sequences()
        tokens, classes = test_set["input_ids"][:][:, :64], test_set["labels"][:][:, 64]
        batch = {name: train_set[name][:64] for name in ("input_ids", "labels")}

        def accuracy(model) -> float:
            return (recipe.demo.predictions(model, tokens) == classes).float().mean().item()

        yield model, batch, accuracy


def test_the_fold_keeps_the_accuracy_where_selection_loses_it(trained) -> None:
    model, batch, accuracy = trained
    base = accuracy(model)
    assert base > 0.6, "the model has learnt something"
    found = {}
    for name, settings in {
        "interpolative, a quarter": {"keep_ratio": 1 / 4},
        "interpolative": {},
        "readout energy": {"reductor": "selection", "selection_score": "readout_energy"},
        "random": {"reductor": "selection", "selection_rule": "random"},
    }.items():
        smaller = copy.deepcopy(model)
        settings = {"strategy": "fixed", "keep_ratio": 1 / 8, **settings}
        record = compress(smaller, [batch], CompreSSMConfig(**settings))
        assert {layer.size_after for layer in record.layers} == {64 * settings["keep_ratio"]}
        found[name] = accuracy(smaller)
    assert found["interpolative, a quarter"] > base - 0.03, found
    assert found["interpolative"] > found["readout energy"] + 0.05 > found["random"], found


def test_the_spectrum_of_a_trained_model_is_concentrated(trained) -> None:
    model, batch, _ = trained
    spectrum = analyze(model, [batch])
    assert all(rank < 32 for rank in spectrum.ranks(0.01).values())


def test_the_demo_runs_as_its_readme_says(tmp_path) -> None:
    """A short run of the whole script: the table, the picture, and the process with stock transformers."""
    command = [sys.executable, str(RECIPE / "demo.py"), "--output-dir", str(tmp_path), "--steps", "60"]
    command += ["--tolerance", "0.02"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"}, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"state size\s+│\s+64\s+│\s+64 -> \d+", result.stdout)
    assert "360 of 360 predictions are the same" in result.stdout
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
    assert (tmp_path / "compressed" / "compressm_history.json").exists()
