"""Finding the trackers of the Trainer that a callback belongs to."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from hf_compressm.training.trackers import trackers_among
from hf_compressm.training.trainer_lookup import neighbours
from tests.cases import tiny_mamba


def trainer_with(callback: TrainerCallback, folder, report_to) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), report_to=report_to, use_cpu=True)
    return Trainer(model=tiny_mamba(), args=args, callbacks=[callback])


def test_only_the_own_trainers_trackers_are_found(tmp_path) -> None:
    mine, other = TrainerCallback(), TrainerCallback()
    trainer = trainer_with(mine, tmp_path, ["tensorboard"])
    stranger = trainer_with(other, tmp_path, ["tensorboard"])
    trackers = trackers_among(neighbours(mine))
    assert [type(tracker) for tracker in trackers] == [TensorBoardCallback]
    assert trackers[0] in trainer.callback_handler.callbacks
    assert trackers[0] not in stranger.callback_handler.callbacks


def test_without_trackers_there_are_none(tmp_path) -> None:
    mine = TrainerCallback()
    trainer = trainer_with(mine, tmp_path, "none")
    assert trackers_among(neighbours(mine)) == [] and trainer is not None
    assert neighbours(TrainerCallback()) == []
