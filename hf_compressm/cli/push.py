"""`hf-compressm push`: a model's folder onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigurationError
from .console import Debug, Quiet, TrustRemoteCode, command, quiet_libraries, say


@command
def push(
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository: user/name, or name for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; it is made if needed.")] = None,
    message: Annotated[str, typer.Option(help="The commit's first line.")] = "Upload a model with a smaller state",
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="Push a folder that was never compressed all the same.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """
    Push a model with its card, history and pictures, in one commit.

    The folder is checked first: nothing is pushed whose configuration disagrees with its weights, and nothing that was
    never compressed, unless you ask for it. Needs a token with write access (`hf auth login`, or HF_TOKEN). Pickles,
    hidden files and the Trainer's checkpoints stay behind.

    **Example**

    ```console
    hf-compressm push smaller me/mamba-130m-smaller --private
    ```
    """
    quiet_libraries()
    from ..compression import HISTORY_NAME
    from ..hub import push_folder

    if folder.is_dir() and not uncompressed and not (folder / HISTORY_NAME).is_file():
        raise ConfigurationError(
            f"{folder} was never compressed: it has no {HISTORY_NAME}. Give the folder that compress or a training "
            "with CompreSSMCallback wrote, or push it all the same with --uncompressed."
        )
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
