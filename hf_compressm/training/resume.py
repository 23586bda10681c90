"""What lets a run go on from a checkpoint whose state is smaller (or larger) than that of the model in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..architectures import StateSpaceLayer, find_layers

_FOLLOWS = "_hf_compressm_follows_checkpoints"


def follow_checkpoints(model: nn.Module) -> None:
    """
    Let every supported layer take the state size of whatever state dict is loaded into the model from now on.

    The Trainer loads a checkpoint's weights into the model that the user built, before any optimizer or wrapper exists;
    the same happens when it goes back to the best checkpoint at the end. Calling this again changes nothing.

    Args:
        model (`torch.nn.Module`): A model with supported layers.

    Raises:
        [`~errors.UnsupportedModelError`]: the model has no layer that can be cut.
    """
    for layer in find_layers(model):
        if not getattr(layer.module, _FOLLOWS, False):
            layer.module.register_load_state_dict_pre_hook(partial(_take_saved_size, layer))
            setattr(layer.module, _FOLLOWS, True)


def _take_saved_size(
    layer: StateSpaceLayer, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    saved = layer.saved_state_size(state_dict, prefix)
    if saved is not None and saved != layer.state_size:
        layer.resize(saved)
