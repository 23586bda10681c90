"""The scripts as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from hf_compressm.systems import DiagonalLTI


def test_accelerate_launches_a_recipe(recipes_folder, tmp_path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(recipes_folder / "listops.py"), "--scale", "tiny", "--method", "compressm", "scratch"]
    command += ["--final-state-size", "4", "--output-dir", str(tmp_path), "--set", "training.max_steps=3"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "CompreSSM in training" in result.stdout
    lines = (tmp_path / "listops-tiny" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["final_state_size"] for line in lines] == [8, 8], "two layers of 4"
    assert (tmp_path / "listops-tiny" / "report.md").exists()


@pytest.mark.parametrize("name", ["smnist", "scifar", "sfashion", "listops", "imdb", "aan", "pathfinder"])
def test_every_recipe_runs_on_its_published_files(name, recipes_folder, tmp_path, capsys) -> None:
    import numpy as np
    from experiments.command_line import run_recipe

    from .published_files import (
        cifar_folder,
        digit_json_folder,
        idx_folder,
        listops_files,
        paper_pairs,
        pathfinder_folder,
        review_folder,
    )

    folder = tmp_path / "data"
    folder.mkdir()
    labels = np.arange(10)
    write = {
        "smnist": digit_json_folder,
        "scifar": lambda f: cifar_folder(f, np.zeros((10, 32, 32, 3), np.uint8), labels),
        "sfashion": lambda f: idx_folder(f, np.zeros((10, 28, 28), np.uint8), labels),
        "listops": listops_files,
        "imdb": review_folder,
        "aan": paper_pairs,
        "pathfinder": pathfinder_folder,
    }[name]
    write(folder)
    arguments = ["--scale", "tiny", "--method", "scratch", "--final-state-size", "2", "--data-dir", str(folder)]
    arguments += ["--output-dir", str(tmp_path), "--set", "training.max_steps=1", "training.batch_size=2"]
    run_recipe("A recipe.", f"{name}.yaml", arguments)
    assert "small from scratch" in capsys.readouterr().out


def test_a_grid_runs_and_reports(recipes_folder, tmp_path, capsys) -> None:
    import grid

    content = {
        "title": "Two methods",
        "config": "sfashion.yaml",
        "scale": "tiny",
        "seeds": [0, 1],
        "settings": {"data.hub_name": "sklearn/digits", "data.pool": 2, "training.max_steps": 2},
        "runs": [{"method": "full"}, {"method": "post_training", "final_state_size": [4, 8]}],
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    arguments = ["--config", str(tmp_path / "two.yaml"), "--results", str(tmp_path / "results")]
    grid.main([*arguments, "--output-dir", str(tmp_path), "--seeds", "0"])
    assert len((tmp_path / "results" / "two.jsonl").read_text().splitlines()) == 3
    grid.main([*arguments, "--output-dir", str(tmp_path)])
    assert len((tmp_path / "results" / "two.jsonl").read_text().splitlines()) == 6
    capsys.readouterr()
    grid.main([*arguments, "--report-only"])
    assert "cut after training" in capsys.readouterr().out
    assert (tmp_path / "results" / "two.png").exists()
    with pytest.raises(SystemExit, match="has no run of this grid"):
        grid.main(["--config", str(tmp_path / "two.yaml"), "--results", str(tmp_path / "none"), "--report-only"])


def test_weyls_bound_holds_in_training(recipes_folder, tmp_path, capsys) -> None:
    import weyl

    arguments = ["--scale", "tiny", "--checks", "4", "--output-dir", str(tmp_path), "--set", "training.max_steps=8"]
    weyl.main([*arguments, "data.hub_name=sklearn/digits", "data.pool=2", "model.num_hidden_layers=2"])
    rows = json.loads((tmp_path / "weyl.json").read_text())
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] * 2
    moves = [(row["move"], row["bound"]) for row in rows if "move" in row]
    assert len(moves) == 8
    assert all(0 < move <= bound * (1 + 1e-6) for move, bound in moves)
    last = [row for row in rows if row["step"] == 8]
    assert all(row["distance"] == 0 and row["correlation"] == pytest.approx(1) for row in last)
    assert "0 of 10 moves beyond" in capsys.readouterr().out
    assert (tmp_path / "weyl.png").stat().st_size > 10_000


def test_the_difference_of_two_systems(recipes_folder) -> None:
    import weyl

    systems = []
    for order in (3, 2):
        lam = 0.9 * torch.rand(order, dtype=torch.float64)
        B, C = torch.randn(order, 2, dtype=torch.float64), torch.randn(1, order, dtype=torch.float64)
        systems.append(DiagonalLTI(lam, B, C))
    u = torch.randn(20, 2, dtype=torch.float64)
    expected = systems[0].simulate(u) - systems[1].simulate(u)
    torch.testing.assert_close(weyl.difference(*systems).simulate(u), expected)


def test_the_figures_of_the_method_show_what_the_text_says(tmp_path) -> None:
    import figures

    figures.main(["--states", "12", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"spectra.png", "output_errors.png"}
    generator = torch.Generator().manual_seed(3)
    system = figures.random_system(24, generator)
    seen, unseen = figures.slow_input(generator), figures.slow_input(generator)
    errors = {
        name: figures.relative_error(system, reduced, unseen) for name, reduced in figures.cuts(system, 6, seen).items()
    }
    assert errors["P from data, readout fitted"] < errors["P from data"] < 0.5 * errors["closed form"]
