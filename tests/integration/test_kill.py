"""A run that is killed 25 times with SIGKILL ends as the run that was never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "kill_test.py"


@pytest.mark.skipif(sys.platform != "linux", reason="attempts are forked processes")
def test_killed_runs_end_as_the_run_that_was_never_killed() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "12", "--no-table", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stderr[-2000:]
    runs = json.loads(result.stdout.strip().splitlines()[-1])
    assert sum(run["kills"] for run in runs) == 12
    phases = [phase for run in runs for phase in run["phases"]]
    assert {"checking", "saving"} <= set(phases), "the kills reached the reduction and the saving"
    assert sum(run["set_aside"] for run in runs) > 0, "a checkpoint was hit while it was written"
    for run in runs:
        assert run["state_size"] == run["expected_state_size"] == 2
        assert run["same_steps"] and run["same_checks"]
        assert run["largest_loss_difference"] < 1e-5
        assert run["final_loss"] == pytest.approx(run["expected_final_loss"], rel=1e-5)
