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


class Asking(TrainerCallback):
    """Takes note of its neighbours in an event."""

    def on_log(self, args, state, control, **kwargs):
        self.neighbours = neighbours(self)


def test_only_the_own_trainers_trackers_are_found(tmp_path) -> None:
    mine, other = Asking(), Asking()
    trainer = trainer_with(mine, tmp_path, ["tensorboard"])
    stranger = trainer_with(other, tmp_path, ["tensorboard"])
    trainer.log({"loss": 1.0})
    trackers = trackers_among(mine.neighbours)
    assert [type(tracker) for tracker in trackers] == [TensorBoardCallback]
    assert trackers[0] in trainer.callback_handler.callbacks
    assert trackers[0] not in stranger.callback_handler.callbacks


def test_a_training_inside_of_another_does_not_mix_them_up(tmp_path) -> None:
    inner = Asking()
    trainer = trainer_with(inner, tmp_path, "none")

    class Nesting(Asking):
        def on_log(self, args, state, control, **kwargs):
            trainer.log({"loss": 1.0})
            super().on_log(args, state, control, **kwargs)

    outer = Nesting()
    trainer_with(outer, tmp_path, ["tensorboard"]).log({"loss": 1.0})
    assert trackers_among(inner.neighbours) == []
    assert len(trackers_among(outer.neighbours)) == 1


def test_a_loop_of_a_users_own_finds_them_too(tmp_path) -> None:
    mine = Asking()
    trainer = trainer_with(mine, tmp_path, ["tensorboard"])
    mine.on_log(trainer.args, trainer.state, trainer.control)
    assert trackers_among(mine.neighbours) == trackers_among(trainer.callback_handler.callbacks)


def test_without_trackers_there_are_none(tmp_path) -> None:
    mine = Asking()
    trainer_with(mine, tmp_path, "none").log({"loss": 1.0})
    assert trackers_among(mine.neighbours) == []
    assert neighbours(TrainerCallback()) == []
