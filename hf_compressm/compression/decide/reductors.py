"""Which reductor cuts each layer, and whether the model can hold what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...architectures import StateSpaceLayer
from ...config import CompreSSMConfig
from ...errors import UnsupportedModelError


def reductors_of(
    layers: Sequence[StateSpaceLayer], config: CompreSSMConfig, holds_forms: Callable[[StateSpaceLayer], bool]
) -> dict[str, str]:
    """
    The reductor of each layer, by the layer's name.

    Args:
        layers (`Sequence[StateSpaceLayer]`): All layers of one model.
        config ([`CompreSSMConfig`]): Its `reductor`, `stock` and `uniform` are used.
        holds_forms (`Callable`): Whether the model's class can become one that holds forms of a layer which the stock
            class cannot.

    Raises:
        [`~errors.UnsupportedModelError`]: a layer cannot hold what the configuration asks for.
    """
    stock = {layer.name: config.stock or not holds_forms(layer) for layer in layers}
    found = {layer.name: _reductor_of(layer, config.reductor, stock[layer.name]) for layer in layers}
    fixed = [layer.name for layer in layers if not layer.sizes_may_differ(stock[layer.name], found[layer.name])]
    if not config.uniform and len(layers) > 1 and fixed:
        raise UnsupportedModelError(
            f"uniform=False would give each layer its own state size, which the checkpoint of {fixed[0]} "
            f"({layers[0].family}) cannot hold. Leave uniform=True."
        )
    return found


def _reductor_of(layer: StateSpaceLayer, name: str, stock: bool) -> str:
    name = layer.default_reductor(stock) if name == "auto" else name
    if name not in layer.reductors(stock):
        raise UnsupportedModelError(
            f"{layer.name} ({layer.family}) cannot hold what the reductor {name!r} gives"
            f"{' in a stock model class' if name in layer.reductors(False) else ''}; "
            f"choose one of {', '.join(sorted(layer.reductors(stock)))}."
        )
    layer.check_form(stock, name)
    return name
