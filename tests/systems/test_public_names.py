"""The names that the rest of the library and its users import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_compressm.systems as systems
from hf_compressm.systems import reductors

FILES = sorted(Path(systems.__file__).parent.rglob("*.py"))


def test_promised_names_are_there() -> None:
    promised = {
        "DiagonalLTI",
        "hankel_singular_values",
        "energy_rank",
        "error_bound",
        "balanced_truncation",
        "interpolative_truncation",
    }
    assert promised <= set(systems.__all__)
    assert set(reductors.__all__) <= set(systems.__all__)
    assert all(getattr(systems, name).__doc__ for name in systems.__all__ if name != "TimeDomain")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"
