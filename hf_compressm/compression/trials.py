"""Cuts that are made to measure their loss and then taken back: the search by loss, and the best of several cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .attempt import CutMaker
from .decide.by_loss import Plan, plans_by_size, smallest_within
from .decide.plan import LayerPlan
from .decide.progress import Stage
from .history import TrialRecord


@dataclass
class Trials:
    """
    Measures what cuts would do, on batches that their truncations were not made with, and changes nothing.

    Args:
        maker ([`~compression.attempt.CutMaker`]): Makes the truncations.
        loss_now (`Callable`): Returns the loss of the model as it is on those batches; the same in every process.
    """

    maker: CutMaker
    loss_now: Callable[[], float]
    records: list[TrialRecord] = field(default_factory=list, init=False)

    def smallest(self, spectra: Mapping[str, Tensor], sizes: Mapping[str, int], stage: Stage) -> Plan:
        """
        The plan with the fewest states that makes the loss worse by at most `max_loss_increase`.

        Args:
            spectra (`Mapping[str, torch.Tensor]`): Hankel singular values of each layer, `(N,)`, descending.
            sizes (`Mapping[str, int]`): Present state size of each layer.
            stage ([`Stage`]): Where in the run the check is made.
        """
        config = self.maker.config
        before = self.loss_now()
        self.records.append(TrialRecord(dict(sizes), "", before))
        allowed = before + abs(before) * config.max_loss_increase * stage.scale
        found = smallest_within(plans_by_size(spectra, sizes, config, stage), allowed, self.loss_of)
        return found or {name: LayerPlan(size, size, size) for name, size in sizes.items()}

    def best_alternative(self, plan: Plan) -> str:
        """
        Which of the ways to truncate the layers loses least at a plan's sizes.

        Args:
            plan (`dict[str, LayerPlan]`): The new sizes.
        """
        names = self.maker.alternatives()
        if len(names) == 1 or not any(layer.is_cut for layer in plan.values()):
            return names[0]
        return min(names, key=lambda name: self.loss_of(plan, name))

    def loss_of(self, plan: Plan, alternative: str = "") -> float:
        """
        The loss after a cut, infinite where it cannot be made or the loss is not a number.

        Args:
            plan (`dict[str, LayerPlan]`): The new sizes.
            alternative (`str`, *optional*, defaults to `""`): Which of the ways to truncate the layers is taken.
        """
        sizes = {name: layer.new_size for name, layer in plan.items()}
        for record in self.records:
            if record.sizes == sizes and record.truncation == alternative:
                return math.inf if record.loss is None else record.loss
        made = self.maker.make(plan, alternative)
        loss = math.inf if made.failures else self.maker.with_cut(made, self.loss_now)
        loss = math.inf if math.isnan(loss) else loss
        self.records.append(TrialRecord(sizes, alternative, loss if math.isfinite(loss) else None))
        return loss
