"""What the tests of several processes are compared with: the same trainings in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .processes import launch

# Doctests are looked for in every file.
collect_ignore = [] if importlib.util.find_spec("deepspeed") else ["deepspeed_worker.py"]

ALONE = ("mamba", "mamba2", "lru", "rolled_back", "twice", "own_loss", "gated")


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    run = launch(path, ALONE, 1)
    assert run.returncode == 0, run.stderr[-4000:]
    return path
