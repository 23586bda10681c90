"""The truncations of the layers that are to be cut: found by every process, those of the first one taken by all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ...config import CompreSSMConfig
from ...errors import TruncationError
from ...systems import Truncation, fit_readouts
from ..measure.layer_gramians import LayerGramians
from ..processes import Processes
from ..progress_bar import with_progress

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """
    A truncation and how it was found.

    Args:
        truncation ([`~systems.Truncation`]): The truncation.
        reductor (`str`): The reductor that gave it; not the one that was asked for where that one failed its checks.
        gramians (`str`): The form of the Gramians behind it; see [`LayerGramians`].
        is_fitted (`bool`): Whether what reads its states was fitted to the layer's outputs.
        unfitted ([`~systems.Truncation`], *optional*): The truncation before that, as the Gramians made it.
    """

    truncation: Truncation
    reductor: str
    gramians: str
    is_fitted: bool = False
    unfitted: Truncation | None = None

    @property
    def by_gramians(self) -> Truncation:
        """The truncation as the Gramians made it, which they can judge; a fit knows more of the outputs."""
        return self.unfitted or self.truncation


def find_truncations(
    gramians: Mapping[str, LayerGramians],
    sizes: Mapping[str, int],
    reductors: Mapping[str, str],
    config: CompreSSMConfig,
    seed: int,
    processes: Processes,
    require_writable: Callable[[str, Truncation], object],
    progress: bool | None = None,
    alternative: str = "",
    finish: Callable[[str, Truncation], Truncation] | None = None,
) -> tuple[dict[str, Found], dict[str, str]]:
    """
    Truncate every layer that gets a new size, in all processes alike.

    Args:
        gramians (`Mapping[str, LayerGramians]`): Of each layer, by its name; the same in every process.
        sizes (`Mapping[str, int]`): The new size of each layer that is to be cut, in the model's order.
        reductors (`Mapping[str, str]`): The reductor of each layer.
        config ([`CompreSSMConfig`]): Names the score and the rule of a selection.
        seed (`int`): Seed of random selections.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        require_writable (`Callable`): Takes a layer's name and a truncation, and raises a
            [`~errors.TruncationError`] where the layer cannot hold it.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.
        alternative (`str`, *optional*, defaults to `""`): Which of [`LayerGramians.alternatives`] is tried first, where
            a layer has it.
        finish (`Callable`, *optional*): Takes a layer's name and its truncation, and adds to it what else the cut does.

    Returns:
        `tuple[dict[str, Found], dict[str, str]]`: The truncations by layer name, on the CPU as the
        Gramians are, and why those of the other layers failed their checks.

    Raises:
        [`~errors.OtherProcessError`]: another process has failed.
    """
    found: dict[str, Found] = {}
    failed: dict[str, str] = {}
    for number, name in enumerate(with_progress(sizes, "cutting", "layer", progress)):
        problems = []
        for measured, reductor in _attempts(gramians[name], reductors[name], alternative):
            try:
                truncation = _truncated(measured, sizes[name], reductor, config, seed + number)
                require_writable(name, truncation)
            except TruncationError as error:
                problems.append(str(error))
                continue
            found[name] = Found(truncation, reductor, measured.form)
            break
        else:
            failed[name] = " Then: ".join(problems)
    found = _with_fitted_readouts(found, gramians, require_writable)
    if finish is not None:
        found = _finished(found, failed, finish, require_writable)
    return processes.first((found, failed))


def _with_fitted_readouts(
    found: Mapping[str, Found],
    gramians: Mapping[str, LayerGramians],
    require_writable: Callable[[str, Truncation], object],
) -> dict[str, Found]:
    """The same, with readouts fitted to sampled outputs where there are some and the layer can hold the fit."""
    cut = {name: item for name, item in found.items() if item.truncation.state_size < item.truncation.full_size}
    samples = {name: gramians[name].samples_for(item.reductor) for name, item in cut.items()}
    known = {name: seen for name, seen in samples.items() if seen is not None}
    fitted = fit_readouts([found[name].truncation for name in known], list(known.values()))
    results = dict(found)
    for name, truncation in zip(known, fitted):
        try:
            require_writable(name, truncation)
        except TruncationError as error:
            logger.info("the readout of %s stays as its Gramians make it: %s", name, error)
            continue
        if truncation.fingerprint() != found[name].truncation.fingerprint():
            before = found[name]
            results[name] = before._replace(truncation=truncation, is_fitted=True, unfitted=before.truncation)
    return results


def _finished(
    found: Mapping[str, Found],
    failed: dict[str, str],
    finish: Callable[[str, Truncation], Truncation],
    require_writable: Callable[[str, Truncation], object],
) -> dict[str, Found]:
    """The same with what else each cut does; a layer that cannot hold that goes to those that failed."""
    results = {}
    for name, item in found.items():
        try:
            truncation = finish(name, item.truncation)
            require_writable(name, truncation)
        except TruncationError as error:
            failed[name] = str(error)
        else:
            results[name] = item._replace(truncation=truncation)
    return results


def _truncated(gramians: LayerGramians, size: int, reductor: str, config: CompreSSMConfig, seed: int) -> Truncation:
    """The truncation to a size; the identity for a layer that keeps its state, and changes in another way."""
    *batch, N, _ = gramians.P.shape
    if size == N:
        return Truncation.from_indices(torch.arange(N).expand(*batch, N), N)
    return gramians.truncate(size, reductor, config, seed=seed)


def _attempts(gramians: LayerGramians, reductor: str, alternative: str) -> list[tuple[LayerGramians, str]]:
    usual = gramians.attempts(reductor)
    other = gramians.alternatives(reductor).get(alternative, gramians)
    return usual if other is gramians else [*other.attempts(reductor), *usual]
