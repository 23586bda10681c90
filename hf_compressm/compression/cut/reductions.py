"""What truncations do to the layers, built and not yet written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...architectures import LayerReduction, StateSpaceLayer
from ...errors import TruncationError
from ...systems import Truncation


def build_reductions(
    layers: Sequence[StateSpaceLayer], truncations: Mapping[str, Truncation]
) -> tuple[list[LayerReduction], dict[str, str]]:
    """
    Build the reduction of every layer that has a truncation.

    Args:
        layers (`Sequence[StateSpaceLayer]`): The layers of one model.
        truncations (`Mapping[str, Truncation]`): The truncations by layer name.

    Returns:
        `tuple[list[LayerReduction], dict[str, str]]`: The reductions, and by layer name why the others' parameters
        cannot hold their truncation.
    """
    reductions: list[LayerReduction] = []
    failed: dict[str, str] = {}
    for layer in layers:
        if layer.name in truncations:
            try:
                reductions.append(layer.reduce(truncations[layer.name]))
            except TruncationError as error:
                failed[layer.name] = str(error)
    return reductions, failed
