"""Whether a saved folder is one model: its configuration, its weights and its history have the same sizes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import registered_families
from ..errors import CompreSSMError, InconsistentModelError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def require_one_model(
    folder: str | os.PathLike,
    model_class: Any,
    sizes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """
    Check that the weights of a folder are those that its configuration describes, and of the sizes that are expected.

    The class loads the folder as `from_pretrained` would, onto the meta device: only the headers of the weights are
    read, and no memory is taken whatever sizes the configuration claims.

    Args:
        folder (`str` or `os.PathLike`): A folder with `config.json` and weights in safetensors files.
        model_class (`type`): The model's class, or one of transformers' `Auto` classes.
        sizes (`Mapping[str, int]`, *optional*): The state size that each layer is expected to have, by its name.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Let an `Auto` class run the folder's own code.

    Raises:
        [`~errors.InconsistentModelError`]: the weights are missing, are no safetensors files, have other shapes than
            the configuration asks for, a layer has another state size than expected, or the configuration builds no
            model.
    """
    folder = Path(folder)
    require_safe_weights(folder)
    try:
        with _without_load_report():
            model, info = model_class.from_pretrained(
                folder,
                device_map={"": "meta"},
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({"trust_remote_code": True} if trust_remote_code else {}),
            )
    except CompreSSMError:
        raise
    except Exception as error:  # transformers' classes and safetensors have no error in common
        raise InconsistentModelError(
            f"the files in {folder} make no model: {type(error).__name__}: {' '.join(str(error).split())[:300]} Save "
            "the model again with save_pretrained, which writes both together."
        ) from error
    problems = [
        f"{name} is {tuple(saved)} in the weights and {tuple(wanted)} by the configuration"
        for name, saved, wanted in sorted(info["mismatched_keys"], key=lambda entry: entry[0])
    ]
    problems += [f"{name} is missing in the weights" for name in sorted(info["missing_keys"])]
    problems = problems or _other_sizes(model, sizes or {})
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InconsistentModelError(
            f"{folder} is not one model: {problems[0]}{more}. Save the model again with save_pretrained, which writes "
            "both together."
        )


def _other_sizes(model: nn.Module, sizes: Mapping[str, int]) -> list[str]:
    found = state_sizes(model) if sizes else {}
    return [
        f"{name} has {found[name]} states and its history says {size}"
        for name, size in sizes.items()
        if name in found and found[name] != size
    ]


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers prints a table of what did not fit, which becomes one line of an error here."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def state_sizes(model: nn.Module) -> dict[str, int]:
    """The state size of every layer of a known family, by its name; also for a model on the meta device."""
    return {
        name: family(name, module).state_size
        for name, module in model.named_modules()
        for family in registered_families().values()
        if family.matches(module)
    }


def require_safe_weights(folder: Path) -> None:
    """
    Check that a folder has weights in safetensors files of its own.

    Args:
        folder (`Path`): The model's folder.

    Raises:
        [`~errors.InconsistentModelError`]: there are none, or an index names a file outside of the folder.
    """
    if not (folder / "config.json").is_file():
        raise InconsistentModelError(f"{folder} has no config.json; give a folder that save_pretrained wrote.")
    index = folder / INDEX_NAME
    if not (folder / WEIGHTS_NAME).is_file() and not index.is_file():
        raise InconsistentModelError(
            f"{folder} has no {WEIGHTS_NAME}. Only safetensors files are read: a pickle can run code when it is loaded."
        )
    if index.is_file():
        shard_names(index)


def shard_names(index: Path) -> set[str]:
    """
    The files that an index of weights names, each of which is next to it.

    Args:
        index (`Path`): The index.

    Raises:
        [`~errors.InconsistentModelError`]: it is no index, or names a file outside of its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InconsistentModelError(f"{index} is not an index of weights: {error!r}.") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InconsistentModelError(
                f"{index} names {name!r}, which is no safetensors file of its own folder; it was not opened."
            )
    return names
