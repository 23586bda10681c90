"""Everything that a cut has to change together: the model, its optimizer, its wrapper and copies of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...architectures import LayerReduction, ParameterChange, StateSpaceLayer, all_changes
from .changes import Change, ModelChange, commit_together, roll_back_together
from .optimizer import OptimizerChange
from .weight_averages import WeightCopy, find_copies

Measured = TypeVar("Measured")

Follow = Callable[[Sequence[ParameterChange]], Change]
"""Prepares what has to change after the model and its optimizer (a wrapper, say) when parameters are replaced."""


@dataclass(frozen=True)
class TrainingState:
    """
    A model in training and what belongs to it.

    Args:
        model (`torch.nn.Module`): The model.
        layers (`Sequence[StateSpaceLayer]`): Its layers.
        optimizer (`torch.optim.Optimizer`, *optional*): Trains the model.
        moments (`str`, *optional*, defaults to `"carry"`): What becomes of its moments, see [`CompreSSMConfig`].
        followers (`Sequence[Follow]`, *optional*): What else follows the model.
        candidates (`Callable`, *optional*): Returns modules and dictionaries of tensors, by a name that stays the same
            in a resumed run, that may be copies of the model's weights.
    """

    model: nn.Module
    layers: Sequence[StateSpaceLayer]
    optimizer: Any = None
    moments: str = "carry"
    followers: Sequence[Follow] = ()
    candidates: Callable[[], Mapping[str, Any]] = dict

    def copies(self) -> list[WeightCopy]:
        """The candidates that are copies of the model's present weights."""
        return find_copies(self.candidates(), self.model, self.layers)

    def with_cut(self, reductions: Sequence[LayerReduction], measure: Callable[[], Measured]) -> Measured:
        """
        What the model alone would measure with a cut, which is taken back.

        Args:
            reductions (`Sequence[LayerReduction]`): What the layers built.
            measure (`Callable`): Looks at the model.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter would be replaced that no module holds.
        """
        change = ModelChange(self.model, reductions, all_changes(self.model, self.layers, reductions))
        commit_together([change])
        try:
            return measure()
        finally:
            roll_back_together([change])

    def commit(
        self,
        reductions: Sequence[LayerReduction],
        of_copies: Sequence[Change] = (),
        probe: Callable[[], float | None] | None = None,
    ) -> float | None:
        """
        Write all or nothing: the layers, the model's configs, the optimizer, the copies and what follows the model.

        Args:
            reductions (`Sequence[LayerReduction]`): What the layers built.
            of_copies (`Sequence[Change]`, *optional*): The changes of the copies, prepared.
            probe (`Callable`, *optional*): Looks at what was written and returns a number, or None where there is none
                to be had. Where it raises, or the number is not finite, everything is put back.

        Returns:
            `float` or `None`: What the probe returned.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter would be replaced that no module holds or nobody trains.
        """
        model = ModelChange(self.model, reductions, all_changes(self.model, self.layers, reductions))
        changes: list[Change] = [model]
        if self.optimizer is not None:
            changes.append(OptimizerChange.of(self.optimizer, model, self.moments))
        changes += of_copies
        followers = [follow(model.parameters) for follow in self.followers]
        commit_together(changes, then=followers)
        try:
            number = None if probe is None else probe()
        except BaseException:
            roll_back_together(changes, then=followers)
            raise
        if number is not None and not math.isfinite(number):
            roll_back_together(changes, then=followers)
        return number
