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
    "consistency",
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
    "consistency": set(),
    "config": set(),
    "systems": {"torch"},
    "ops": {"torch", "numpy", "numba", "triton"},
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


def test_tests_mirror_the_package() -> None:
    """A folder of tests bears the name of the folder that it tests; what tests several has a name of its own."""
    tests = Path(__file__).parent
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    mirrored = {folder for folder in folders if folder.parts and folder.parts[0] in rooms}
    assert len(mirrored) >= 15
    assert {folder.as_posix() for folder in mirrored if not (PACKAGE / folder).is_dir()} == set()


def test_no_file_holds_two_concepts() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()
    }
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{path.relative_to(PACKAGE).as_posix()} {node.name}": node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def imports_at_load(path: Path, package: Path) -> set[str]:
    """Names of the modules that importing a file imports: not those inside of functions or for type checkers alone."""
    found = set()
    stem = [package.name, *path.relative_to(package).with_suffix("").parts]
    inside = stem[:-1]

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                base = inside[: len(inside) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                # A name of a package may be a module in it, or something that its __init__ gives.
                found.update(f"{source}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for block in ("body", "orelse", "finalbody"):
                    visit(getattr(node, block, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of a package import which others of it when they are imported."""
    names = {}
    for path in package.rglob("*.py"):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in names.items():
        wanted = imports_at_load(path, package)
        reached = {other if other in names else other.rpartition(".")[0] for other in wanted}
        graph[name] = (reached & set(names)) - {name}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first of them again at the end; empty where there is none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if circle := search(other, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := search(name, []))), [])


def test_no_circle_of_imports() -> None:
    assert " -> ".join(circle_in(import_graph(PACKAGE))) == ""


def test_a_circle_is_found_and_one_for_type_checkers_is_none(tmp_path: Path) -> None:
    package = tmp_path / "made"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from .two import thing\n")
    two = package / "two.py"
    two.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import other\n")
    assert circle_in(import_graph(package)) == []
    two.write_text("from . import one\n")
    assert circle_in(import_graph(package)) == ["made.one", "made.two", "made.one"]
