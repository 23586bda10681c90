"""Whether a model can hold what a configuration asks for, found out before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..architectures import StateSpaceLayer, can_hold_forms
from ..config import CompreSSMConfig
from ..errors import UnsupportedModelError


def chosen_reductors(model: nn.Module, layers: Sequence[StateSpaceLayer], config: CompreSSMConfig) -> dict[str, str]:
    """
    The reductor of every layer, by the layer's name.

    Args:
        model (`torch.nn.Module`): The whole model.
        layers (`Sequence[StateSpaceLayer]`): All of its layers.
        config ([`CompreSSMConfig`]): Its `reductor`, `stock` and `uniform` are used.

    Raises:
        [`~errors.UnsupportedModelError`]: a layer, or the model's checkpoint, cannot hold what the configuration asks
            for.
    """
    needs_stock = {layer.name: config.stock or not can_hold_forms(model, layer) for layer in layers}
    reductors = {layer.name: _reductor_of(layer, config.reductor, needs_stock[layer.name]) for layer in layers}
    if config.uniform or len(layers) < 2:
        return reductors
    for layer in layers:
        if not layer.sizes_may_differ(needs_stock[layer.name], reductors[layer.name]):
            raise UnsupportedModelError(
                f"uniform=False would give each layer its own state size, which the checkpoint of {layer.name} "
                f"({layer.family}) cannot hold. Leave uniform=True."
            )
    return reductors


def _reductor_of(layer: StateSpaceLayer, name: str, stock: bool) -> str:
    name = layer.default_reductor(stock) if name == "auto" else name
    if name not in layer.reductors(stock):
        raise UnsupportedModelError(
            f"{layer.name} ({layer.family}) cannot hold what the reductor {name!r} gives"
            f"{' in a stock model class' if name in layer.reductors(False) else ''}; "
            f"choose one of {', '.join(sorted(layer.reductors(stock)))}."
        )
    return name
