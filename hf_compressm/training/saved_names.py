"""A checkpoint that names or splits its tensors otherwise than the model does, as transformers writes some families."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping, core_model_loading

from .shards import files_of_checkpoint


def take_names_of_model(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """
    Give a state dict that is about to be loaded the names that a model of transformers has in memory, in place.

    `save_pretrained` writes the experts of a mixture one by one and three convolutions for one, for some families;
    `from_pretrained` knows how to read that, and the Trainer, which resumes with `load_state_dict`, does not: what it
    cannot place stays as it is in memory. The model already has the form of the checkpoint.

    Args:
        model (`torch.nn.Module`): The model; one that is not of transformers saves its own names.
        state_dict (`dict`): All tensors of a checkpoint, or one file of several. Where it cannot be read completely it
            is left as it is, for the load to say what is wrong.
    """
    if not isinstance(model, PreTrainedModel):
        return
    files = files_of_checkpoint()
    saved, expected = set(state_dict if files is None else files.names), set(model.state_dict())
    if not (saved - expected and expected - saved):
        return
    if files is not None and not files.is_first:
        # The first file has brought everything.
        state_dict.clear()
        return
    loaded = _read(model, dict(state_dict) if files is None else None, None if files is None else files.folder)
    if loaded is not None:
        state_dict.clear()
        state_dict.update(loaded)


def by_name_in_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Tensors of a checkpoint by the names that a model has for them, as far as these are other names and no other shapes.

    Ling's layers are called `attention` on disk and `self_attn` in memory, so that no layer would find its own tensors.

    Args:
        model (`torch.nn.Module`): The model; one that is not of transformers saves its own names.
        tensors (`Mapping[str, torch.Tensor]`): Tensors by the names that they have on disk.
    """
    known = model.state_dict()
    if not isinstance(model, PreTrainedModel) or known.keys() >= tensors.keys():
        return dict(tensors)
    # Private API of transformers.
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)]
    found = {}
    for name, tensor in tensors.items():
        renamed, converter = core_model_loading.rename_source_key(name, renamings, converters)
        # A converter takes several tensors for one.
        found[name if name in known or converter is not None else renamed] = tensor
    return found


def _read(model: PreTrainedModel, state_dict: dict[str, Any] | None, folder: str | None) -> dict[str, Tensor] | None:
    dtype = torch.float32
    for parameter in model.parameters():
        dtype = torch.promote_types(dtype, parameter.dtype)
    settings = {"config": copy.deepcopy(model.config), "dtype": dtype, "output_loading_info": True}
    loaded, report = type(model).from_pretrained(folder, state_dict=state_dict, **settings)
    return None if report["missing_keys"] or report["mismatched_keys"] else loaded.state_dict()
