"""Checkpoints by their folders' names."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compressm.files import checkpoint_folder, checkpoint_step, checkpoints_in


def test_checkpoints_are_what_the_trainer_writes_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1000, 90, 200):
        (tmp_path / f"{PREFIX_CHECKPOINT_DIR}-{step}").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "incomplete-checkpoint-5").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints_in(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (90, 200, 1000)]
    assert checkpoints_in(tmp_path / "missing") == []


def test_a_folder_that_only_contains_the_name_is_no_checkpoint() -> None:
    assert checkpoint_step(Path("run/checkpoint-30")) == 30
    assert checkpoint_step(Path("run/incomplete-checkpoint-30")) is None
    assert checkpoint_step(Path("run/checkpoint-30.1")) is None
