"""`hf-compressm report`: the history of a run as a table, a picture and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, Quiet, command, say

PAGE_NAME = "compressm_report.html"
PICTURE_NAME = "compressm_report.png"


@command
def report(
    run_dir: Annotated[Path, typer.Argument(help="The Trainer's output folder, or a compressed model's.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the page and the picture.")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Show what every check of a run saw and did.

    Prints a table, and writes a picture and a page of HTML that holds everything and asks nothing of the network.

    **Example**

    ```console
    hf-compressm report runs/mamba
    ```
    """
    from ..cards import RunReport
    from ..files import replace_file
    from .report_page import draw_run, render_page

    run = RunReport.from_folder(run_dir)
    folder = output or run_dir
    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(run.table())
    picture = draw_run(run)
    replace_file(folder / PICTURE_NAME, picture)
    replace_file(folder / PAGE_NAME, render_page(run, picture).encode("utf-8"))
    say(f"\nThe picture: {folder / PICTURE_NAME}\nThe page: {folder / PAGE_NAME}", quiet)
