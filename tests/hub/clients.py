"""Processes that talk to the loopback Hub: the client reads where the Hub is when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hf_compressm

from .loopback import LoopbackHub

ROOT = Path(hf_compressm.__file__).parents[1]


def client(hub: LoopbackHub, work: Path, script: str, *arguments: str, python: str = sys.executable) -> Any:
    """Run a script in a process of its own that talks to the loopback Hub; returns what it prints as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    home = hub.client_environment(work / f"home-{len(list(work.glob('home-*')))}")
    Path(home["HF_HOME"]).mkdir()
    paths = {"PYTHONPATH": str(ROOT)} if python == sys.executable else {}
    result = subprocess.run(
        [python, "-c", textwrap.dedent(script), *arguments],
        env={**kept, **home, **paths, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
