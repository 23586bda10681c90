"""Starting the workers of the distributed tests, and reading what they ended with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path, cases: tuple[str, ...], processes: int, worker: str = "worker.py", **environment: str
) -> subprocess.CompletedProcess:
    """Run the worker in one process or, by torchrun, in several."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{processes}"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    command += [str(Path(__file__).parent / worker), str(folder), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def result(folder: Path, case: str, processes: int, rank: int) -> dict:
    """What a process ended with."""
    return torch.load(folder / f"{case}-{processes}-{rank}.pt", weights_only=False)


def largest_difference(one: dict, other: dict) -> float:
    assert one["parameters"].keys() == other["parameters"].keys()
    return max((one["parameters"][name] - other["parameters"][name]).abs().max().item() for name in one["parameters"])
