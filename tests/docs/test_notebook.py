"""The notebook runs from top to bottom, and what is committed is what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hf_compressm

ROOT = Path(hf_compressm.__file__).parents[1]

if sys.version_info < (3, 11):
    pytest.skip("the pinned kernel of the notebook needs Python 3.11", allow_module_level=True)


def notebooks() -> ModuleType:
    specification = importlib.util.spec_from_file_location("execute", ROOT / "recipes" / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def printed(cells: list) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(cells: list) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_the_notebook_runs_and_is_committed_with_its_outputs() -> None:
    import nbformat

    execute = notebooks()
    committed = nbformat.read(execute.NOTEBOOK, as_version=4)
    now = execute.executed(execute.NOTEBOOK)
    assert [cell.source for cell in now.cells] == [cell.source for cell in committed.cells]
    for content in (committed, now):
        text = printed(content.cells)
        assert "state size 32 -> 8 in 2 layers" in text
        assert "MambaForCausalLM with 8 states" in text
        assert pictures(content.cells) == 1


def test_a_cell_that_warns_is_refused(tmp_path: Path) -> None:
    import nbformat

    notebook = tmp_path / "warns.ipynb"
    cells = [nbformat.v4.new_code_cell("import sys; print('a warning', file=sys.stderr)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    with pytest.raises(RuntimeError, match="a cell writes to stderr: a warning"):
        notebooks().executed(notebook)
