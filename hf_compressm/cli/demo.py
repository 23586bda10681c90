"""`hf-compressm demo`: the digits recipe, as it is installed with the package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, Quiet, command, say

_NEEDED = {"datasets": "datasets", "rich": "rich", "sklearn": "scikit-learn"}


@command
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where models, data and the picture go.")] = Path("demo_output"),
    steps: Annotated[int, typer.Option(min=60, help="Training steps of each of the two runs.")] = 750,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Train a small Mamba on real digits twice, without and with the callback, and compare.

    Takes two to three minutes on two CPU cores and downloads nothing. What it leaves in the folder is something to try
    the other commands on.

    **Example**

    ```console
    hf-compressm demo --steps 200
    ```
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}")
    arguments = ["--output-dir", str(output_dir), "--steps", str(steps), *(["--quiet"] if quiet else [])]
    finished = subprocess.run([sys.executable, str(recipe()), *arguments], check=False)
    if finished.returncode:
        raise typer.Exit(finished.returncode)
    say(f"Now try: hf-compressm report {output_dir / 'compressed'}", quiet)


def recipe() -> Path:
    """The demo's script: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    places = [package / "_recipes" / "digits" / "demo.py", package.parent / "recipes" / "digits" / "demo.py"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"the demo's script is in neither {places[0]} nor {places[1]}; install hf_compressm anew.")
