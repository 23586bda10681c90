"""The program: its commands, and what an error looks like."""

from __future__ import annotations

import typer

from .analyze import analyze
from .compress import compress
from .demo import demo
from .push import push
from .report import report

app = typer.Typer(
    name="hf-compressm",
    help="Make state-space models (Mamba, LRU, S4D) smaller: measure them, compress them, push them.\n\n"
    "To see what it is about: `hf-compressm demo`",
    epilog="Exit codes: 0 done, 1 an error, 2 wrong usage, 3 nothing to cut, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (analyze, compress, report, push, demo):
    app.command()(command)


def main() -> None:
    """Run the program with the arguments of the process."""
    app()
