"""State sizes that compiled kernels refuse: causal-conv1d takes multiples of 8 channels, and a cut may change them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from .changes import StateForm
from .contract import StateSpaceLayer

# Of causal-conv1d's kernels, in the layout in which transformers calls them.
_CHANNELS = 8
_CONVOLUTION = "conv1d.weight"


def convolution_channels(layer: StateSpaceLayer, size: int) -> int | None:
    """
    How many channels the convolution of a layer has at a state size, or None where they do not depend on it.

    Args:
        layer ([`StateSpaceLayer`]): The layer, in a form whose convolution a cut makes smaller.
        size (`int`): A state size.
    """
    return _channels(layer.state_shapes(size))


def size_multiple(layer: StateSpaceLayer) -> int:
    """
    The number whose multiples are the state sizes that causal-conv1d's kernels take, or 1 where a size changes nothing.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
    """
    return _multiple(convolution_channels(layer, 0), convolution_channels(layer, 1))


def _channels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = shapes.get(_CONVOLUTION)
    return None if shape is None else shape[0]


def _multiple(none: int | None, one: int | None) -> int:
    if none is None or one is None or none % _CHANNELS:
        return 1
    return next(multiple for multiple in range(1, _CHANNELS + 1) if multiple * (one - none) % _CHANNELS == 0)


def row_multiple(layer: StateSpaceLayer) -> int:
    """
    The number whose multiples are the rows of projections that causal-conv1d's kernels take, whatever the layer's form.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
    """
    return _multiple(*(_channels(layer.shapes_of_form(StateForm(rows, rows))) for rows in (0, 1)))


def refused_size(layer: StateSpaceLayer, size: int) -> str | None:
    """
    Why causal-conv1d's kernels would refuse a layer of a state size that they take now, or None.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
        size (`int`): A state size.
    """
    now, then = convolution_channels(layer, layer.state_size), convolution_channels(layer, size)
    if now is None or then is None or now % _CHANNELS or not then % _CHANNELS:
        return None
    return (
        f"with {size} states the convolution of {layer.name} has {then} channels, and causal-conv1d, which "
        f"transformers calls on a GPU where it is installed, takes multiples of {_CHANNELS} only; "
        f"multiple_of={size_multiple(layer)} gives sizes that it takes"
    )


def runs_on_kernels(layer: StateSpaceLayer) -> bool:
    """
    Whether causal-conv1d's kernels are what a layer runs on here.

    Args:
        layer ([`StateSpaceLayer`]): The layer.
    """
    on_a_gpu = any(parameter.is_cuda for parameter in layer.module.parameters())
    return on_a_gpu and importlib.util.find_spec("causal_conv1d") is not None
