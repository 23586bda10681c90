"""The truncations of the layers that are to be cut: found by every process, those of the first one taken by all."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm.auto import tqdm

from ...config import CompreSSMConfig
from ...errors import TruncationError
from ...systems import Truncation
from ..measure.layer_gramians import LayerGramians
from ..processes import Processes


def find_truncations(
    gramians: Mapping[str, LayerGramians],
    sizes: Mapping[str, int],
    reductors: Mapping[str, str],
    config: CompreSSMConfig,
    seed: int,
    processes: Processes,
    progress: bool | None = None,
) -> tuple[dict[str, Truncation], dict[str, str]]:
    """
    Truncate every layer that gets a new size, in all processes alike.

    Args:
        gramians (`Mapping[str, LayerGramians]`): Of each layer, by its name; the same in every process.
        sizes (`Mapping[str, int]`): The new size of each layer that is to be cut, in the model's order.
        reductors (`Mapping[str, str]`): The reductor of each layer.
        config ([`CompreSSMConfig`]): Names the score and the rule of a selection.
        seed (`int`): Seed of random selections.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Returns:
        `tuple[dict[str, Truncation], dict[str, str]]`: The truncations by layer name, each on the device of the layer's
        Gramians, and why those of the other layers failed their checks.

    Raises:
        [`~errors.OtherProcessError`]: another process has failed.
    """
    found: dict[str, Truncation] = {}
    failed: dict[str, str] = {}
    disable = None if progress is None else not progress
    for number, name in enumerate(tqdm(sizes, desc="cutting", unit="layer", leave=False, disable=disable)):
        try:
            found[name] = gramians[name].truncate(sizes[name], reductors[name], config, seed=seed + number)
        except TruncationError as error:
            failed[name] = str(error)
    found, failed = processes.first((found, failed))
    return {name: truncation.to(gramians[name].device) for name, truncation in found.items()}, failed
