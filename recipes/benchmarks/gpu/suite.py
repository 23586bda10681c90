"""The tests that need a GPU, without mamba-ssm's kernels and with them, as a table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from .session import Session

ROOT = Path(__file__).parents[3]
# What is run, and whether mamba-ssm and causal-conv1d are hidden in it: the tests' smallest models have widths that the
# kernels refuse.
RUNS = {"torch alone": ("tests/gpu", True), "mamba-ssm's kernels": ("tests/gpu/test_kernels.py", False)}


def run(session: Session) -> None:
    """Run pytest twice; a run with a failed test is a failure of the part."""
    rows, figures = [], {}
    for name, (path, hidden) in RUNS.items():
        figures[name] = session.attempt(name, partial(_counts, session, path, hidden))
        for file, found in (figures[name] or {}).items():
            counts = [str(found[key]) for key in ("passed", "failed", "skipped")]
            rows.append([name, file, *counts, f"{found['time']:.0f} s"])
            session.failures += [f"{name}: {test}" for test in found["names"]]
    session.write(
        "gpu_tests",
        "Tests on a GPU",
        ["with", "file", "passed", "failed", "skipped", "time"],
        rows,
        figures,
        "`tests/gpu` with mamba-ssm hidden from transformers, and the tests of mamba-ssm's kernels with it.",
    )


def _counts(session: Session, path: str, hidden: bool) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", path]
        command += ["-n", "4"] if importlib.util.find_spec("xdist") else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"HIDE_MAMBA_SSM": "1"} if hidden else {}
        subprocess.run(command, cwd=ROOT, env=environment, timeout=2 * session.seconds, check=False)
        found: dict[str, dict] = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            file = case.get("classname", "").rsplit(".", 1)[-1]
            row = found.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0, "time": 0.0, "names": []})
            row["time"] += float(case.get("time", 0))
            tags = {child.tag for child in case}
            end = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            row[end] += 1
            row["names"] += [case.get("name")] if end == "failed" else []
        return found
