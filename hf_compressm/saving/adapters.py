"""Adapters (PEFT) on a model whose layers were cut: the layers lie beside the adapter, and can be put back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn

from ..architectures import all_changes, find_layers
from ..compression.cut.changes import ModelChange, commit_together
from ..compression.cut.snapshot import LAYERS_NAME, Snapshot
from ..errors import UnsupportedModelError

_ADAPTER_CONFIG = "adapter_config.json"


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter, which is saved without the model that it belongs to."""
    return (Path(folder) / _ADAPTER_CONFIG).is_file()


def load_cut_layers(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Give a model the cut layers that lie beside an adapter.

    A training run with an adapter saves the adapter alone, while the cut changed the model below it. That model, as it
    was before the run, takes the layers before the adapter is put on it, or afterwards.

    Args:
        model (`torch.nn.Module`): The model that the adapter was trained on, at the state size it had, with or without
            the adapter. It is changed in place.
        folder (`str` or `os.PathLike`): What `trainer.save_model` wrote, a checkpoint, or the Hub name of a repository
            with its files.

    Raises:
        [`~errors.UnsupportedModelError`]: the folder has no cut layers, or the model has not the layers that it holds.
        [`~errors.DimensionError`]: a layer of the model has not the width of the one that was cut.

    Example:

    ```python
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from hf_compressm import load_cut_layers

    model = AutoModelForCausalLM.from_pretrained("the/base")
    load_cut_layers(model, "trained")
    model = PeftModel.from_pretrained(model, "trained")
    model.merge_and_unload().save_pretrained("whole")  # or train on, or use it as it is
    ```
    """
    folder = Path(folder) if os.path.isdir(folder) else Path(hf_hub_download(os.fspath(folder), LAYERS_NAME)).parent
    if not (folder / LAYERS_NAME).is_file():
        raise UnsupportedModelError(
            f"{folder} has no {LAYERS_NAME}; give the folder of an adapter that was saved after a cut of its model."
        )
    layers = find_layers(model)
    saved = Snapshot.load(folder, LAYERS_NAME)
    found = {name: [layer.name for layer in layers if _same_layer(name, layer.name)] for name in saved.forms}
    unclear = sorted(name for name, names in found.items() if len(names) != 1)
    if unclear or len({names[0] for names in found.values()}) != len(found):
        raise UnsupportedModelError(
            f"{folder / LAYERS_NAME} holds {', '.join(unclear or found)}; the model has "
            f"{', '.join(layer.name for layer in layers)}. Give the model that the adapter was trained on."
        )
    renamed = _renamed(saved, {name: names[0] for name, names in found.items()})
    reductions = renamed.reductions(layers)
    commit_together([ModelChange(model, reductions, all_changes(model, layers, reductions))])


def _same_layer(one: str, other: str) -> bool:
    """Whether two names are the same but for a wrapper's name before one of them."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _renamed(saved: Snapshot, names: Mapping[str, str]) -> Snapshot:
    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            new + name.removeprefix(old): value
            for old, new in names.items()
            for name, value in values.items()
            if name.startswith(f"{old}.")
        }

    return Snapshot({names[name]: form for name, form in saved.forms.items()}, own(saved.parameters))
