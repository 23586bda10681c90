"""From a folder or a name on the Hub to a model: safetensors, code of ours only, checked before memory is taken."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from .. import models  # noqa: F401  (makes our own model types known to the Auto classes)
from ..cards import Provenance
from ..compression import history_of
from ..errors import InconsistentModelError, UnsupportedModelError
from ..files import read_json_object
from ..saving import require_one_model, require_safe_weights
from .errors import translated

# Configuration, tokenizer and weights; never a pickle, never code.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def fetch(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    patterns: Sequence[str] = _PATTERNS,
) -> Path:
    """
    The folder of a model, downloaded into the Hub's cache where it is no folder here.

    Args:
        name (`str`): A folder, or a repository on the Hub (`"user/name"`).
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str`, *optional*): Token for a private repository; the stored one when unset.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Fetch the repository's Python files too.
        patterns (`Sequence[str]`, *optional*): The names of the files to fetch; all of a model when unset.

    Raises:
        [`~errors.UnsupportedModelError`]: there is no such folder, and it is no name that a repository can have.
        [`~errors.HubError`]: the Hub refused or could not be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UnsupportedModelError(
            f"{name!r} is neither a folder nor a name on the Hub; give a folder with config.json, or user/name."
            f"{_similar(name)}"
        ) from error
    # A mistyped folder looks like a name on the Hub.
    with translated(f"there is no folder {name} here{_similar(name)}, and loading it from the Hub", name):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=[*patterns, *(["*.py"] if trust_remote_code else [])],
                ignore_patterns=["*/*"],
            )
        )


def _similar(name: str) -> str:
    """The folder beside the one that was named whose name is nearly the same, as a remark; empty where none is."""
    parent = Path(name).parent
    beside = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    found = difflib.get_close_matches(Path(name).name, beside, n=1, cutoff=0.75)
    return f" (did you mean {parent / found[0]}?)" if found else ""


def model_class_of(folder: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """
    The class that a folder's configuration names, found by transformers' `Auto` classes.

    Args:
        folder (`str` or `os.PathLike`): A folder with `config.json`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Let transformers run the Python files in the
            folder; without it a model that needs them is refused.

    Returns:
        `type`: A model class, or the `Auto` class that loads it where its code lies in the folder.

    Raises:
        [`~errors.InconsistentModelError`]: `config.json` cannot be read.
        [`~errors.UnsupportedModelError`]: transformers does not know the model, or only its own code does.
    """
    folder = Path(folder)
    written = _config_of(folder)
    auto_map = written.get("auto_map") if isinstance(written.get("auto_map"), dict) else {}
    kernel = _kernel_in(written)
    if kernel is not None and not trust_remote_code:
        raise UnsupportedModelError(
            f"the configuration in {folder} asks for the kernel {kernel!r}, code of another repository, which was not "
            "fetched. Remove that entry, or pass trust_remote_code (--trust-remote-code) if you trust it."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        # A type that is registered is read by its own class whatever code is next to it, so that is no reason.
        if auto_map and not trust_remote_code and not _is_registered(written.get("model_type")):
            raise UnsupportedModelError(
                f"{folder} brings Python code of its own ({', '.join(sorted(map(str, auto_map.values())))}), which was "
                "not run. Read it, and pass trust_remote_code (--trust-remote-code) if you trust it."
            ) from error
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read the configuration in {folder}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    architecture = next(iter(written.get("architectures") or []), None)
    for name in _AUTO_CLASSES:
        model_class = _registered_class(getattr(transformers, name), config)
        if model_class is not None and architecture in (None, model_class.__name__):
            return model_class
        if name in auto_map and trust_remote_code:
            return getattr(transformers, name)
    raise UnsupportedModelError(
        f"{folder} is a {architecture} ({config.model_type}), which no Auto class of transformers loads; supported are "
        f"models of {', '.join(_AUTO_CLASSES)}."
    )


def load_model(folder: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    Load a folder's model on the CPU in evaluation mode, after a check that its files fit together.

    The check reads only the headers of the weights, so that a configuration that claims an absurd size is refused
    before any memory is taken.

    Args:
        folder (`str` or `os.PathLike`): From [`fetch`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): See [`model_class_of`].

    Raises:
        [`~errors.InconsistentModelError`]: configuration, weights and history do not fit together.
        [`~errors.UnsupportedModelError`]: see [`model_class_of`].
    """
    folder = Path(folder)
    model_class = loadable_class(folder, trust_remote_code)
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    return model_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **trust).eval()


def loadable_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """
    The class of a folder whose configuration, weights and history are those of one model.

    Args:
        folder (`Path`): The folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): See [`model_class_of`].

    Raises:
        [`~errors.InconsistentModelError`]: they do not fit together.
    """
    require_safe_weights(folder)
    model_class = model_class_of(folder, trust_remote_code)
    sizes = Provenance(history_of(folder)).sizes()
    require_one_model(folder, model_class, sizes, trust_remote_code=trust_remote_code)
    return model_class


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / "config.json")
    except FileNotFoundError as error:
        raise InconsistentModelError(
            f"{folder} has no config.json; give a folder that save_pretrained wrote."
        ) from error


def _kernel_in(written: Any) -> str | None:
    """The repository of compiled code that a configuration names; transformers would fetch and run it."""
    if isinstance(written, list):
        return next((found for value in written if (found := _kernel_in(value))), None)
    if not isinstance(written, dict):
        return None
    for name, value in written.items():
        named = value.values() if isinstance(value, dict) else [value]
        if str(name).endswith("_implementation"):
            for choice in named:
                if isinstance(choice, str) and "/" in choice:
                    return choice
        if (found := _kernel_in(value)) is not None:
            return found
    return None


def _is_registered(model_type: Any) -> bool:
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _registered_class(auto_class: Any, config: Any) -> Any:
    """The class that an `Auto` class holds for a configuration, or None; its mapping has no public name."""
    # Private API of transformers.
    mapping = auto_class._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found
