"""The README and the pages of docs: their code runs as pasted, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import MambaForCausalLM
from typer.testing import CliRunner

import hf_compressm
from hf_compressm.cli.app import app
from tests.cases import tiny_mamba, token_batch

ROOT = Path(hf_compressm.__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def block_with(page: Path, text: str) -> str:
    (found,) = [block for block in blocks(page, "python") if text in block]
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, a heading that is not there"


def test_the_example_of_a_family_is_the_one_that_is_tested() -> None:
    tested = (ROOT / "tests" / "architectures" / "toy_family.py").read_text(encoding="utf-8")
    assert blocks(ROOT / "docs" / "add_a_family.md", "python") == [tested]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_compressm.__version__


def test_contributing_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()) - {"help"}
    told = set(re.findall(r"make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert targets <= told


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_quickstart_runs_as_pasted(tmp_path: Path) -> None:
    code = block_with(ROOT / "README.md", "trainer.train()")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"state size 64 -> \d+ in 2 layers", run.stdout)
    assert 1 <= MambaForCausalLM.from_pretrained(tmp_path / "smaller").config.state_size < 64


def test_the_lines_without_a_trainer_run() -> None:
    code = block_with(ROOT / "README.md", "analyze(model").replace("sizes=[8, 16, 32]", "sizes=[2, 4]")
    model = tiny_mamba()
    names = {"model": model, "batches": [token_batch(seed=seed) for seed in range(4)], "optimizer": None}
    exec(compile(code, "README.md", "exec"), names)
    assert names["record"].outcome in ("cut", "kept") and len(names["spectrum"].sizes) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    lines = [
        line for language in ("bash", "console") for block in blocks(page, language) for line in block.splitlines()
    ]
    for line in lines:
        command = re.match(r"(?:\$ )?hf-compressm (\w+)(.*)", line.split("#")[0])
        if command is None:
            continue
        told = CliRunner().invoke(app, [command.group(1), "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0, line
        for option in re.findall(r"--[a-z-]+", command.group(2)):
            assert option in told.output, f"{option} in {line}"
