"""Odd command lines, run in this process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from hf_compressm.cli.app import app
from hf_compressm.errors import CompreSSMError
from tests.cases import tiny_mamba
from tests.hub.tokenizer import tiny_tokenizer

from .judge import Case, fingerprint, shown

_ODD_TEXTS = [
    "", " ", "-1", "0", "1", "2", "4", "7", "1e9", "99999999999", "nan", "inf", "0.5", "1.5", "50%", "-5%", "%", "abc",
    "4,2", "4,,2", "2,4,", "\u4e2d", "a b", "..", "/", "/dev/null", "~", "missing", "model", "small", "text.txt",
    "empty.txt", "broken.json", "rows.csv", "selection", "balanced", "white_noise", "--", "-o", "user/", "a/b/c",
]  # fmt: skip
_OPTIONS = {
    "analyze": ["--tolerance", "--sizes", "--gramians", "--length", "--sequences", "--batch-size", "--plot"],
    "compress": ["--tolerance", "--state-size", "--ratio", "--max-loss-increase", "--method", "--multiple-of",
                 "--gramians", "--seed", "--length", "--sequences", "--text-column", "--tokenizer"],
    "report": ["--output", "-o"],
    "evaluate": ["--length", "--sequences"],
}  # fmt: skip
_FLAGS = {
    "analyze": ["--json", "--no-timing"],
    "compress": ["--per-layer", "--stock", "--dry-run", "--quiet"],
}


class Refused(CompreSSMError):
    """What the command says to a user as it ends."""


def _prepared(folder: Path) -> None:
    if (folder / "model").exists():
        return
    tiny_mamba(8).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    letters = random.Random(0).choices("abcdefghijkl", k=600)
    (folder / "text.txt").write_text(" ".join(letters))
    (folder / "empty.txt").write_text("")
    (folder / "broken.json").write_text('{"text": "a b')
    (folder / "rows.csv").write_text("text,other\na b c d,1\nb c d e,2\n")


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Odd command lines without end.

    Args:
        draw (`random.Random`): Chooses them.
        folder (`Path`): Where they run.
    """
    _prepared(folder)
    number = 0
    while True:
        command = draw.choice(["analyze", "compress", "compress", "report", "demo-"])
        arguments = [command]
        arguments += ["model"] if draw.random() < 0.8 else draw.choice([[], [draw.choice(_ODD_TEXTS)]])
        if command in ("analyze", "compress"):
            file = "text.txt" if draw.random() < 0.8 else draw.choice(_ODD_TEXTS)
            arguments += [draw.choice(["--text-file", "--data-file"]), file, "--length", "16", "--sequences", "8"]
        if command == "compress":
            number += 1
            output = f"small{number}" if draw.random() < 0.8 else draw.choice(["model", "text.txt", "/dev/null/x", ""])
            arguments += ["-o", output]
        options = _OPTIONS.get(command, [])
        for option in draw.sample(options, min(draw.randint(0, 2), len(options))):
            arguments += [option, draw.choice(_ODD_TEXTS)]
        arguments += [flag for flag in _FLAGS.get(command, []) if draw.random() < 0.3]
        watched = [folder / name for name in ("model", "text.txt", "rows.csv")]
        yield Case(command, shown(arguments), partial(_run, folder, arguments), partial(fingerprint, *watched))


def _run(folder: Path, arguments: list[str]) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise Refused(" ".join(f"{result.stderr} {result.stdout}".split()))
    return result
