"""A cut that is not yet accepted: what takes it back, in this process or in one that resumes the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...architectures import LayerReduction
from .snapshot import AVERAGES_NAME, Snapshot
from .training_state import TrainingState
from .weight_averages import WeightCopy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingCut:
    """
    A cut that was made and may still be taken back. To accept it is to drop this object, and with it the old tensors.

    Args:
        model ([`Snapshot`]): What the cut replaced in the model and in its optimizer.
        averages (`Mapping[str, Snapshot]`): What it replaced in each copy of the weights, by the copy's name.
        judge_at (`int`, *optional*): The training step from which on it is judged; unset where that is done at once.
    """

    model: Snapshot
    averages: Mapping[str, Snapshot] = field(default_factory=dict)
    judge_at: int | None = None

    @classmethod
    def of(
        cls,
        state: TrainingState,
        reductions: Iterable[LayerReduction],
        copies: Iterable[WeightCopy],
        judge_at: int | None = None,
    ) -> PendingCut:
        """
        Refer to everything that a cut is about to replace; nothing but scalars is copied.

        Args:
            state ([`~compression.cut.training_state.TrainingState`]): The model and what belongs to it, before the cut.
            reductions (`Iterable[LayerReduction]`): What the cut does to the model's layers.
            copies (`Iterable[WeightCopy]`): The copies of the weights that are cut with it.
            judge_at (`int`, *optional*): As above.
        """
        reductions = list(reductions)
        layers = [reduction.layer for reduction in reductions]
        replaced = [change.old for reduction in reductions for change in reduction.parameters]
        snapshot = Snapshot.of(layers, state.optimizer, only=replaced)
        return cls(snapshot, {copy.name: copy.snapshot_like(snapshot) for copy in copies}, judge_at)

    def take_back(self, state: TrainingState) -> None:
        """
        Put back what the cut replaced, in the model, its optimizer and the copies of its weights, or nothing at all.

        A copy that was not there at the cut gets the model's own weights from before it.

        Args:
            state ([`~compression.cut.training_state.TrainingState`]): The model and what belongs to it, after the cut.

        Raises:
            [`~errors.DimensionError`]: a tensor has not the shape that its layer needs.
        """
        copies = state.copies()
        for copy in copies:
            if copy.name not in self.averages:
                logger.warning(
                    "there is no average of the weights from before the cut for %s; its layers that were cut get the "
                    "weights that the model had then.",
                    copy.name,
                )
        returns = [copy.restored(self.averages.get(copy.name, self.model)) for copy in copies]
        state.commit(self.model.reductions(state.layers), returns)

    def save(self, folder: str | os.PathLike) -> None:
        """
        Write the tensors to a folder; `judge_at` belongs to the run's own state.

        Args:
            folder (`str` or `os.PathLike`): An existing folder.
        """
        self.model.save(folder)
        if self.averages:
            Snapshot.joined(self.averages).save(folder, AVERAGES_NAME)

    @classmethod
    def load(cls, folder: str | os.PathLike, judge_at: int | None = None) -> PendingCut:
        """
        Read what [`~PendingCut.save`] wrote.

        Args:
            folder (`str` or `os.PathLike`): The folder.
            judge_at (`int`, *optional*): The training step from which on the cut is judged.

        Raises:
            `FileNotFoundError`: the folder holds no snapshot.
        """
        has_averages = (Path(folder) / AVERAGES_NAME).is_file()
        averages = Snapshot.load(folder, AVERAGES_NAME).parts() if has_averages else {}
        return cls(Snapshot.load(folder), averages, judge_at)
