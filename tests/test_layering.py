"""Imports run downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_compressm

PACKAGE = Path(hf_compressm.__file__).parent

# From the ground up; a module may import from its own floor's package and from lower floors.
FLOORS = [
    "_registration",
    "errors",
    "validation",
    "files",
    "systems",
    "config",
    "ops",
    "models",
    "architectures",
    "compression",
    "cards",
]
FLOORS += ["saving", "hub", "api", "training", "cli", "__main__"]

ALLOWED_OUTSIDE = {
    "_registration": set(),
    "errors": set(),
    "validation": set(),
    "config": set(),
    "systems": {"torch"},
    "ops": {"torch", "numpy", "numba"},
    "models": {"torch", "transformers", "huggingface_hub"},
    "architectures": {"torch"},
    "files": set(),
    "compression": {"torch", "tqdm", "matplotlib", "safetensors", "tabulate"},
    "cards": {"huggingface_hub", "tabulate", "matplotlib", "yaml"},
    "saving": {"torch", "huggingface_hub", "safetensors"},
    "api": {"torch"},
    "training": {"torch", "tqdm", "numpy", "transformers", "accelerate", "psutil"},
    "hub": {"torch", "transformers", "huggingface_hub"},
    "__main__": set(),
    "cli": {
        "torch",
        "transformers",
        "huggingface_hub",
        "datasets",
        "typer",
        "tqdm",
        "jinja2",
        "matplotlib",
        "tabulate",
    },
}

STANDARD_LIBRARY = __import__("sys").stdlib_module_names


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports."""
    package = ["hf_compressm", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [stem] if node.module else [f"{stem}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    floor = floor_of(path)
    assert floor in FLOORS, f"{path} stands on no floor; name it in FLOORS"
    for name in imports(path):
        if name.startswith("hf_compressm."):
            other = name.split(".")[1]
            assert FLOORS.index(other) <= FLOORS.index(floor), f"{path.name} imports {name} from a higher floor"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors_use_only_their_libraries(path: Path) -> None:
    allowed = ALLOWED_OUTSIDE[floor_of(path)]
    outside = {name.split(".")[0] for name in imports(path)} - {"hf_compressm"} - set(STANDARD_LIBRARY)
    assert outside <= allowed, f"{path.name} imports {outside - allowed}"


def test_the_rule_sees_relative_and_absolute_imports(tmp_path: Path) -> None:
    assert "hf_compressm.architectures.changes" in imports(PACKAGE / "architectures" / "families" / "mamba.py")
    assert "hf_compressm.systems" in imports(PACKAGE / "compression" / "decide" / "plan.py")


def test_no_file_holds_two_concepts() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
