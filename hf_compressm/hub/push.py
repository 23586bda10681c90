"""A folder onto the Hub: checked first, in one commit, tried again where the Hub stumbles."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..cards import Provenance, describe_folder, renamed
from ..compression import history_of
from ..errors import ConfigurationError, HubError, InconsistentModelError
from ..saving import read_card, write_card, write_model_files
from .errors import HTTP_ERRORS, is_passing, translated
from .loading import loadable_class

_Tried = Callable[..., Any]

logger = logging.getLogger(__name__)

LEFT_OUT = (".*", "*/.*", "checkpoint-*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5")
"""Never pushed: hidden files, checkpoints of the Trainer, and weights or states in formats that can hold code."""

# Weights of an earlier version would disagree with the new configuration; they go in the same commit.
_REPLACED = ["model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json"]


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model with a smaller state",
    trust_remote_code: bool = False,
    attempts: int = 5,
    wait: float = 1.0,
) -> str:
    """
    Push a model's folder: configuration, weights, card, history and pictures, in one commit.

    The folder is checked first, and nothing is sent if its configuration, weights and history do not fit together. A
    card without a section about the compression gets one from the history. Weights of an earlier version in the
    repository are removed in the same commit. Hidden files, the Trainer's checkpoints and pickles stay behind.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        repo_id (`str`): The repository (`"user/name"`, or `"name"` for one's own); it is made if needed.
        private (`bool`, *optional*): Make a new repository private.
        revision (`str`, *optional*): Branch to push to; it is made if needed.
        token (`str`, *optional*): Token with write access; the stored one when unset.
        commit_message (`str`, *optional*): The commit's first line.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Let the check run the folder's own Python code.
        attempts (`int`, *optional*, defaults to 5): How often a request is tried where the Hub is busy or breaks off.
        wait (`float`, *optional*, defaults to 1.0): Seconds before the second attempt; each further wait is twice as
            long.

    Returns:
        `str`: The address of the commit.

    Raises:
        [`~errors.InconsistentModelError`]: the folder's files do not fit together, or one leads out of the folder.
        [`~errors.ConfigurationError`]: the name is none that a repository can have.
        [`~errors.HubError`]: the Hub refused (the message says why), could not be reached, or the repository is public
            although a private one was asked for. The local files are whole, and another call goes on where this ended.
    """
    folder = Path(folder)
    _require_pushable(folder, repo_id, trust_remote_code)
    api = HfApi(token=token)

    def tried(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _try_again(lambda: call(*args, **kwargs), attempts, wait)

    return _upload(api, folder, repo_id, private, revision, commit_message, tried)


def _require_pushable(folder: Path, repo_id: str, trust_remote_code: bool) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(f"{repo_id!r} is no name for a repository: {error}") from error
    require_own_files(folder)
    loadable_class(folder, trust_remote_code)


def _upload(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str, tried: _Tried
) -> str:
    with translated(f"pushing to {repo_id}", repo_id):
        repo_id = tried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
        if private and not tried(api.model_info, repo_id).private:
            raise HubError(
                f"{repo_id} is there already and is public; nothing was pushed. Make it private in its settings, or "
                "choose another name."
            )
        _complete_card(folder, repo_id)
        if revision is not None:
            tried(api.create_branch, repo_id, branch=revision, exist_ok=True)
        commit = tried(
            api.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(LEFT_OUT),
            delete_patterns=_REPLACED,
        )
    return commit.commit_url


def require_own_files(folder: Path) -> None:
    """
    Check that no symbolic link in a folder leads out of it; what it points to would be uploaded.

    Args:
        folder (`Path`): The folder.

    Raises:
        [`~errors.InconsistentModelError`]: it is no folder, or a link leads out of it.
    """
    if not folder.is_dir():
        raise InconsistentModelError(f"{folder} is no folder; give one that save_pretrained wrote.")
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise InconsistentModelError(
                f"{path} is a link to {path.resolve()}, outside of the folder; nothing was pushed. Copy the file into "
                "the folder, or remove the link."
            )


def _complete_card(folder: Path, repo_id: str) -> None:
    """A card with a section about the compression, which names the repository."""
    card, records = read_card(folder), history_of(folder)
    if records and (card is None or "<!-- hf_compressm:begin" not in card):
        write_model_files(folder, describe_folder(folder, Provenance(records, name=repo_id)))
    elif card is not None and renamed(card, repo_id) != card:
        write_card(folder, renamed(card, repo_id))


def _try_again(call: Callable[[], Any], attempts: int, wait: float) -> Any:
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except HTTP_ERRORS as error:
            if attempt == attempts or not is_passing(error):
                raise
            seconds = wait * 2 ** (attempt - 1)
            logger.warning("attempt %d of %d: %s; trying again in %g s", attempt, attempts, error, seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")
