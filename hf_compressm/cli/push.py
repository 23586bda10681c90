"""`hf-compressm push`: a model's folder onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, Quiet, TrustRemoteCode, command, quiet_libraries, say


@command
def push(
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository: user/name, or name for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; it is made if needed.")] = None,
    message: Annotated[str, typer.Option(help="The commit's first line.")] = "Upload a model with a smaller state",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Push a model with its card, history and pictures, in one commit.

    The folder is checked first: nothing is pushed whose configuration disagrees with its weights. Needs a token with
    write access (`hf auth login`, or HF_TOKEN). Pickles, hidden files and the Trainer's checkpoints stay behind.

    **Example**

    ```console
    hf-compressm push smaller me/mamba-130m-smaller --private
    ```
    """
    quiet_libraries()
    from ..hub import push_folder

    say(f"Pushing {folder} to {repo_id}.", quiet)
    address = push_folder(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        commit_message=message,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(address)
