"""Make a plan's cut: find the truncations, cut everything together, and put it back where the loss breaks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..architectures import LayerReduction
from ..config import CompreSSMConfig
from ..systems import Truncation, registered_reductors
from .costs import cuts_that_do_not_pay, total_cost
from .cut.pending_cut import PendingCut
from .cut.reductions import build_reductions
from .cut.training_state import TrainingState
from .cut.weight_averages import WeightCopy
from .decide.plan import LayerPlan
from .decide.rows import RowChoice
from .decide.truncations import Found, find_truncations
from .history import size_range
from .measure.layer_gramians import LayerGramians
from .measure.output_fits import OutputFit
from .processes import Processes

logger = logging.getLogger(__name__)

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Attempt:
    """
    What became of a plan.

    Args:
        outcome (`str`): `"cut"`, `"kept"` or `"skipped"`, as in a [`CheckRecord`].
        reason (`str`): One sentence for a person.
        loss_after (`float`, *optional*): The calibration loss after it.
        found (`dict[str, Found]`): What the layers that were cut were cut with, by name.
        pending ([`PendingCut`], *optional*): The cut, where it is not yet accepted.
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


@dataclass(frozen=True)
class MadeCut:
    """
    A cut that is ready to be written.

    Args:
        found (`dict[str, Found]`): What each layer is cut with, by name.
        reductions (`list[LayerReduction]`): What the layers built.
        failures (`list[str]`): Why layers that should be cut cannot be.
    """

    found: dict[str, Found]
    reductions: list[LayerReduction]
    failures: list[str]

    def without(self, names: Collection[str]) -> MadeCut:
        """The same cut with some layers, by name, left as they are."""
        found = {name: item for name, item in self.found.items() if name not in names}
        return replace(self, found=found, reductions=[r for r in self.reductions if r.layer.name not in names])


@dataclass(frozen=True)
class CutMaker:
    """
    Makes the truncations of plans, in all processes alike.

    Args:
        state ([`~compression.cut.training_state.TrainingState`]): The model and what belongs to it.
        gramians (`Mapping[str, LayerGramians]`): The Gramians of the layers, by name.
        reductors (`Mapping[str, str]`): The reductor of each layer.
        config ([`CompreSSMConfig`]): How to cut.
        processes ([`~compression.processes.Processes`]): The processes that train the model together.
        seed (`int`): Seed of random selections.
        progress (`bool`, *optional*): Show a progress bar; when unset, only on a terminal.
        fits (`Sequence[OutputFit]`, *optional*, defaults to `()`): What fits cut layers to the outputs they had.
        state_bytes (`Mapping[str, int]`): Memory of each layer's recurrent state, from a [`Calibration`].
        rows ([`RowChoice`], *optional*): Chooses the rows that projections keep; all stay when unset.
    """

    state: TrainingState
    gramians: Mapping[str, LayerGramians]
    reductors: Mapping[str, str]
    config: CompreSSMConfig
    processes: Processes
    seed: int
    progress: bool | None = None
    fits: Sequence[OutputFit] = ()
    state_bytes: Mapping[str, int | None] = field(default_factory=dict)
    rows: RowChoice | None = None

    def sizes(self, plan: Mapping[str, LayerPlan]) -> dict[str, int]:
        """
        The state size of every layer that a plan changes, be it in the rows of its projections alone.

        Args:
            plan (`Mapping[str, LayerPlan]`): What is wanted of each layer, by name.
        """
        narrower = () if self.rows is None else self.rows.narrower(plan)
        return {name: layer.new_size for name, layer in plan.items() if layer.is_cut or name in narrower}

    def alternatives(self) -> list[str]:
        """The names of the ways to truncate, the usual one first; see [`LayerGramians.alternatives`]."""
        names = [name for layer, known in self.gramians.items() for name in known.alternatives(self.reductors[layer])]
        return list(dict.fromkeys(names))

    def make(self, plan: Mapping[str, LayerPlan], alternative: str = "") -> MadeCut:
        """
        Find the truncations of a plan and build what they do to the layers.

        Args:
            plan (`Mapping[str, LayerPlan]`): What is wanted of each layer, by name.
            alternative (`str`, *optional*, defaults to `""`): The way to truncate.
        """
        sizes = self.sizes(plan)
        layers = {layer.name: layer for layer in self.state.layers}
        found, failed = find_truncations(
            self.gramians, sizes, self.reductors, self.config, self.seed, self.processes,
            lambda name, truncation: layers[name].reduce(truncation), self.progress, alternative,
            None if self.rows is None else self._with_rows,
        )  # fmt: skip
        truncations = {name: item.truncation for name, item in found.items()}
        reductions, unfit = build_reductions(self.state.layers, truncations)
        fitting = {name: item for name, item in found.items() if name not in unfit}
        if reductions:
            for fit in self.fits:
                fit.remember_outputs()
        return MadeCut(fitting, reductions, [f"{name}: {message}" for name, message in {**failed, **unfit}.items()])

    def _with_rows(self, name: str, truncation: Truncation) -> Truncation:
        return self.rows.added_to(name, truncation, self.gramians[name])

    def with_cut(self, made: MadeCut, measure: Callable[[], Measured]) -> Measured:
        """
        What the model would measure with a cut, fitted to its outputs where that is asked for; it is taken back.

        Args:
            made ([`MadeCut`]): The cut.
            measure (`Callable`): Looks at the model.
        """

        def fitted() -> Measured:
            self.fit(made)
            return measure()

        return self.state.with_cut(made.reductions, fitted)

    def fit(self, made: MadeCut) -> set[str]:
        """
        Fit the layers of a cut that is written to the outputs that they had before.

        What was cut in closed form has a bound, which a fit would end, and is fitted only where that was asked for.

        Args:
            made ([`MadeCut`]): The cut.

        Returns:
            `set[str]`: The layers whose weights are others now.
        """
        reductors = registered_reductors()
        names = [
            name
            for name, found in made.found.items()
            if (self.config.fit_readout or found.gramians != "closed_form")
            and not reductors[found.reductor].only_selects
        ]
        return set().union(*(fit.fit(names) for fit in self.fits))


def prepare_cut(
    maker: CutMaker, plan: Mapping[str, LayerPlan], alternative: str, loss: float | None
) -> MadeCut | Attempt:
    """
    Make what a plan asks for, and leave out what must not or need not be cut. Nothing is written.

    Args:
        maker ([`CutMaker`]): Makes the truncations.
        plan (`Mapping[str, LayerPlan]`): What is wanted of each layer, by name.
        alternative (`str`): The way to truncate.
        loss (`float`, *optional*): The calibration loss.

    Returns:
        [`MadeCut`] or [`Attempt`]: What is ready to be written, or why nothing is.
    """
    if not maker.sizes(plan):
        wanted, size = max(layer.wanted for layer in plan.values()), max(layer.size for layer in plan.values())
        asks = "the loss asks" if maker.config.strategy == "loss" else "the spectra ask"
        step = "" if maker.config.multiple_of == 1 else f", in multiples of {maker.config.multiple_of}"
        return Attempt("kept", f"{asks} for {wanted} of {size} states{step}", loss)
    made = maker.make(plan, alternative)
    if made.failures and (maker.config.uniform or not made.reductions):
        maker.processes.agree("how to cut", {"failures": made.failures})
        return Attempt("skipped", f"a truncation failed its checks: {'; '.join(made.failures)}", loss)
    if maker.config.may_grow:
        return made
    costs = cuts_that_do_not_pay(made.reductions, maker.state_bytes, together=maker.config.uniform)
    if not costs:
        return made
    maker.processes.agree("how to cut", {"failures": made.failures, "does not pay": sorted(costs)})
    cost = total_cost(list(costs.values()))
    why = (
        f"a cut to {size_range(plan[name].new_size for name in costs)} states would add {cost.added_bytes:,} bytes of "
        f"weights and save {cost.saved_bytes:,} bytes of recurrent state a sequence; to cut all the same: set "
        "allow_growth=True"
    )
    if len(costs) == len(made.reductions):
        return Attempt("kept", f"left as it was: {'; '.join([why, *made.failures])}", loss)
    return replace(made.without(costs), failures=[*made.failures, *(f"{name}: {why}" for name in costs)])


def attempt_cut(
    maker: CutMaker,
    plan: Mapping[str, LayerPlan],
    alternative: str,
    loss: float | None,
    evaluate: Callable[[], float],
    note: Callable[[Mapping[str, Found]], None],
    step: int | None = None,
) -> Attempt:
    """
    Cut all layers that a plan wants to be smaller, in all processes alike, or none.

    Args:
        maker ([`CutMaker`]): Makes the truncations.
        plan (`Mapping[str, LayerPlan]`): What is wanted of each layer, by name.
        alternative (`str`): The way to truncate.
        loss (`float`, *optional*): The calibration loss before the cut.
        evaluate (`Callable`): Returns the calibration loss; asked where there was one before the cut.
        note (`Callable`): Takes what the layers were cut with, and looks at the cut model for the record.
        step (`int`, *optional*): The training step.

    Raises:
        [`~errors.DisagreementError`]: the processes would cut differently. Nothing was changed.
        `Exception`: what `evaluate` or `note` raised. The cut was taken back.
    """
    made = prepare_cut(maker, plan, alternative, loss)
    if isinstance(made, Attempt):
        return made
    truncations = {name: item.truncation for name, item in made.found.items()}
    facts = {name: truncation.fingerprint() for name, truncation in truncations.items()}
    maker.processes.agree("how to cut", {**facts, "failures": made.failures})
    copies = maker.state.copies()
    pending = _pending(maker.state, made.reductions, copies, maker.config, step)

    fitted: set[str] = set()

    def fit_and_evaluate() -> float | None:
        fitted.update(maker.fit(made))
        after = None if loss is None else evaluate()
        if after is None or math.isfinite(after):
            note(made.found)
        return after

    after = maker.state.commit(made.reductions, [copy.cut(truncations) for copy in copies], fit_and_evaluate)
    if after is not None and not math.isfinite(after):
        return Attempt("skipped", f"the loss after the cut was {after}; the cut was taken back")
    allow = "the loss allows it" if maker.config.strategy == "loss" else "the spectra allow it"
    if not any(layer.is_cut for layer in plan.values()):
        allow = "the mixing needs fewer rows of the projections"
    reason = allow if not made.failures else f"some layers stay as they are: {'; '.join(made.failures)}"
    if made.failures:
        logger.warning(reason)
    found = {name: item._replace(is_fitted=item.is_fitted or name in fitted) for name, item in made.found.items()}
    return Attempt("cut", reason, after, found, pending)


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
