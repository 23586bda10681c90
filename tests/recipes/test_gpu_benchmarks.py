"""Every line of what is measured on a GPU runs here too, at sizes of no meaning."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import run_gpu  # noqa: E402
from gpu.build_kernels import keep_one_architecture  # noqa: E402
from gpu.session import Session  # noqa: E402

TABLES = {
    "mamba": ["gpu_mamba"],
    "mamba2": ["gpu_mamba2"],
    "delta_rule": ["gpu_delta_rule"],
    "time_invariant": ["gpu_time_invariant", "gpu_diagonal_scan"],
    "reduction": ["gpu_reduction_cost"],
    "in_training": ["gpu_in_training"],
}


@pytest.mark.parametrize("part", TABLES)
def test_a_part_writes_its_tables(part: str, tmp_path) -> None:
    session = Session(torch.device("cpu"), tiny=True, output=tmp_path, seconds=500)
    assert run_gpu.run_part(part, session) == []
    for name in TABLES[part]:
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["device"] == "CPU" and content["failures"] == [] and content["figures"]
        lines = (tmp_path / f"{name}.md").read_text().splitlines()
        assert lines[0].startswith("# ") and lines[-1].endswith("measured on CPU.")
        cells = [cell.strip() for line in lines if line.startswith("| ") for cell in line.strip("|").split("|")]
        assert "" not in cells or part == "in_training"


def test_the_command_hides_the_kernels_and_says_how_each_part_ended(tmp_path, capfd) -> None:
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(tmp_path),
        "--parts",
        "without_kernels",
        "--seconds",
        "400",
    ]
    assert run_gpu.main(arguments) == 0
    assert "without_kernels: done" in capfd.readouterr().out
    assert (tmp_path / "gpu_mamba_without_kernels.md").exists()


def test_a_failed_part_is_named_and_the_next_one_runs(tmp_path, monkeypatch, capfd) -> None:
    codes = iter([1, 0, 3])
    monkeypatch.setattr(run_gpu.subprocess, "run", lambda *a, **k: run_gpu.subprocess.CompletedProcess(a, next(codes)))
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--parts", "mamba", "mamba2", "reduction"]
    assert run_gpu.main(arguments) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if ": " in line] == [
        "mamba: failed with exit code 1", "mamba2: done", "reduction: some figures failed",
    ]  # fmt: skip


def test_a_failed_figure_is_named_in_the_table(tmp_path) -> None:
    session = Session(torch.device("cpu"), output=tmp_path)
    assert session.attempt("one", lambda: 1) == 1
    assert session.attempt("other", lambda: 1 / 0) is None
    session.started -= 2 * session.seconds
    assert session.attempt("late", lambda: 1) is None
    session.write("some", "Some", ["a"], [["1"]], {}, "A note.")
    text = (tmp_path / "some.md").read_text()
    assert "other: ZeroDivisionError: division by zero; late: left out, the part's 150 s were over." in text


def test_a_setup_is_left_with_one_architecture() -> None:
    flags = "".join(
        f'    cc_flag.append("-gencode")\n    cc_flag.append("arch=compute_{name},code=sm_{name}")\n'
        for name in ("80", "90", "100")
    )
    kept = keep_one_architecture(f"if True:\n{flags}", "90")
    cc_flag: list[str] = []
    exec(kept, {"cc_flag": cc_flag})
    assert cc_flag == ["-gencode", "arch=compute_90,code=sm_90"]
    with pytest.raises(ValueError, match="setup.py compiles for 80, 90, 100, not for 70"):
        keep_one_architecture(flags, "70")
