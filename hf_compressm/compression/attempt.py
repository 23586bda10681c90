"""Carry a plan out: find the truncations, cut everything together, and put it back where the loss breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..architectures import LayerReduction
from ..config import CompreSSMConfig
from ..systems import Truncation
from .cut.pending_cut import PendingCut
from .cut.reductions import build_reductions
from .cut.training_state import TrainingState
from .cut.weight_averages import WeightCopy
from .decide.plan import LayerPlan
from .decide.truncations import Found, find_truncations
from .measure.calibration import Calibration
from .processes import Processes


@dataclass(frozen=True)
class Attempt:
    """
    What became of a plan.

    Args:
        outcome (`str`): `"cut"`, `"kept"` or `"skipped"`, as in a [`CheckRecord`].
        reason (`str`): One sentence for a person.
        loss_after (`float`, *optional*): The calibration loss after it.
        found (`dict[str, Found]`): What the layers that were cut were cut with, by name.
        pending ([`PendingCut`], *optional*): The cut, where it awaits its judgement.
    """

    outcome: str
    reason: str
    loss_after: float | None = None
    found: dict[str, Found] = field(default_factory=dict)
    pending: PendingCut | None = None

    @property
    def truncations(self) -> dict[str, Truncation]:
        """The truncations alone."""
        return {name: item.truncation for name, item in self.found.items()}


def attempt_cut(
    state: TrainingState,
    plan: Mapping[str, LayerPlan],
    calibration: Calibration,
    reductors: Mapping[str, str],
    config: CompreSSMConfig,
    processes: Processes,
    seed: int,
    evaluate: Callable[[], float],
    step: int | None = None,
    progress: bool | None = None,
) -> Attempt:
    """
    Cut all layers that a plan wants to be smaller, in all processes alike, or none.

    Args:
        state ([`~compression.cut.training_state.TrainingState`]): The model and what belongs to it.
        plan (`Mapping[str, LayerPlan]`): What is wanted of each layer, by name.
        calibration ([`Calibration`]): The Gramians, and the loss before the cut.
        reductors (`Mapping[str, str]`): The reductor of each layer.
        config ([`CompreSSMConfig`]): How to cut.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        seed (`int`): Seed of random selections.
        evaluate (`Callable`): Returns the calibration loss; asked where there was one before the cut.
        step (`int`, *optional*): The training step.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.

    Raises:
        [`~errors.DisagreementError`]: the processes would cut differently. Nothing was changed.
    """
    if not any(layer.is_cut for layer in plan.values()):
        wanted, size = max(layer.wanted for layer in plan.values()), max(layer.size for layer in plan.values())
        return Attempt("kept", f"the spectra ask for {wanted} of {size} states", calibration.loss)
    sizes = {name: layer.new_size for name, layer in plan.items() if layer.is_cut}
    layers = {layer.name: layer for layer in state.layers}
    found, failed = find_truncations(
        calibration.gramians, sizes, reductors, config, seed, processes,
        lambda name, truncation: layers[name].reduce(truncation), progress,
    )  # fmt: skip
    reductions, unfit = build_reductions(state.layers, {name: item.truncation for name, item in found.items()})
    found = {name: item for name, item in found.items() if name not in unfit}
    truncations = {name: item.truncation for name, item in found.items()}
    failures = [f"{name}: {message}" for name, message in {**failed, **unfit}.items()]
    if failures and (config.uniform or not reductions):
        processes.agree("how to cut", {"failures": failures})
        return Attempt("skipped", f"a truncation failed its checks: {'; '.join(failures)}", calibration.loss)
    facts = {name: truncation.fingerprint() for name, truncation in truncations.items()}
    processes.agree("how to cut", {**facts, "failures": failures})
    copies = state.copies()
    pending = _pending(state, reductions, copies, config, step)
    probe = None if calibration.loss is None else evaluate
    loss = state.commit(reductions, [copy.cut(truncations) for copy in copies], probe)
    if loss is not None and not math.isfinite(loss):
        return Attempt("skipped", f"the loss after the cut was {loss}; the cut was taken back")
    reason = "the spectra allow it" if not failures else f"some layers stay as they are: {'; '.join(failures)}"
    return Attempt("cut", reason, loss, found, pending)


def _pending(
    state: TrainingState,
    reductions: Sequence[LayerReduction],
    copies: Sequence[WeightCopy],
    config: CompreSSMConfig,
    step: int | None,
) -> PendingCut | None:
    if not config.can_roll_back:
        return None
    later = config.judged_by_evaluation and step is not None
    return PendingCut.of(state, reductions, copies, step + config.rollback_after if later else None)
