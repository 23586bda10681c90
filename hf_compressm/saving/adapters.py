"""Cut layers from a folder into a module: from beside an adapter (PEFT), or with all other weights of the module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..architectures import all_changes, find_layers
from ..compression.cut.changes import ModelChange, commit_together
from ..compression.cut.snapshot import LAYERS_NAME, Snapshot
from ..errors import UnsupportedModelError
from .one_model import INDEX_NAME
from .whole_module import WHOLE_NAMES, load_whole, weights_file

_ADAPTER_CONFIG = "adapter_config.json"


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter, which is saved without the model that it belongs to."""
    return (Path(folder) / _ADAPTER_CONFIG).is_file()


def load_cut_layers(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Give any module the shapes and values of the cut layers in a folder.

    A module of a class of your own, in plain PyTorch, is built as for the training and gets all its weights. A model
    that an adapter (PEFT) was trained on, as it was before the run, gets the layers saved next to the adapter,
    before that is put on it or afterwards. Make an optimizer after this call.

    Args:
        model (`torch.nn.Module`): The module, of any state size. It is changed in place.
        folder (`str` or `os.PathLike`): What `trainer.save_model` wrote, a checkpoint, a folder with
            `model.safetensors` (or an index of several such files, or `pytorch_model.bin`), one file with a state dict,
            or the Hub name of a repository with such files.

    Raises:
        [`~errors.UnsupportedModelError`]: the folder has neither cut layers nor weights, or the model has not the
            layers that it holds.
        [`~errors.InconsistentModelError`]: the weights are not those of the module. Nothing was changed.
        [`~errors.DimensionError`]: a layer of the model has not the width of the one that was cut.

    Example:

    ```python
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from hf_compressm import load_cut_layers

    own = MyModule()  # a class of your own
    load_cut_layers(own, "trained")

    model = AutoModelForCausalLM.from_pretrained("the/base")
    load_cut_layers(model, "trained_with_an_adapter")
    model = PeftModel.from_pretrained(model, "trained_with_an_adapter")
    model.merge_and_unload().save_pretrained("whole")  # or train on, or use it as it is
    ```
    """
    folder = Path(folder) if os.path.exists(folder) else _from_hub(os.fspath(folder))
    if not (folder / LAYERS_NAME).is_file():
        weights = weights_file(folder)
        if weights is None:
            raise UnsupportedModelError(
                f"{folder} has neither {LAYERS_NAME} nor one of {', '.join(WHOLE_NAMES)}; give the folder of a module, "
                "or of an adapter, that was saved after a cut."
            )
        load_whole(model, weights)
        return
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


def _from_hub(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, LAYERS_NAME)).parent
    except EntryNotFoundError:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", INDEX_NAME]))


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
