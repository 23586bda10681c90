"""
Runs a notebook from top to bottom, in an empty folder, and writes its outputs into it.

    python recipes/notebooks/execute.py [NOTEBOOK] [--output FILE]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("compress_while_training.ipynb")


def executed(notebook: Path, seconds: float = 600) -> nbformat.NotebookNode:
    """
    A notebook with the outputs of its cells, without when they ran.

    Args:
        notebook (`Path`): The notebook.
        seconds (`float`, *optional*, defaults to 600): How long one cell may take.

    Raises:
        `nbclient.exceptions.CellExecutionError`: a cell raises an error.
    """
    content = nbformat.read(notebook, as_version=4)
    # Where other processes want the cores, threads that wait for one another make it many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            content,
            timeout=seconds,
            record_timing=False,
            resources={"metadata": {"path": folder}},
            kernel_name="python3",
        )
        client.execute()
    # The kernel's own version would change the file on every machine.
    content.metadata.pop("language_info", None)
    for cell in content.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"a cell writes to stderr: {output.text}")
    return content


def main() -> None:
    """Run it and write it."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("notebook", type=Path, nargs="?", default=NOTEBOOK)
    parser.add_argument("--output", type=Path, help="by default the notebook itself")
    options = parser.parse_args()
    content = executed(options.notebook)
    nbformat.write(content, options.output or options.notebook)


if __name__ == "__main__":
    main()
