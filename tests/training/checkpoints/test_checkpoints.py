"""Checkpoints that a crash left behind are recognised, set aside, and never resumed from."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.training.checkpoints import running_mark
from hf_compressm.training.checkpoints.integrity import problem_with
from hf_compressm.training.checkpoints.replacing import before_replacing, set_aside_incomplete, wait_until_set_aside
from hf_compressm.training.checkpoints.running_mark import LOCK_NAME, _start_of, is_active, mark_active
from tests.cases import tiny_mamba
from tests.training.test_callback import make_trainer
from tests.training.test_resume import SAVES, TWO_CUTS, StopAt


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, CompreSSMCallback(TWO_CUTS), callbacks=[StopAt(6)], **{**SAVES, "save_steps": 3}).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run")) / "checkpoint-6"


def truncate(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def test_a_whole_checkpoint_has_no_problem(checkpoint) -> None:
    assert problem_with(checkpoint) is None
    assert set_aside_incomplete(checkpoint.parent) == []


DAMAGES = {
    "state is missing": (lambda c: (c / "trainer_state.json").unlink(), "has no trainer_state.json"),
    "state is half": (lambda c: truncate(c / "trainer_state.json"), "trainer_state.json ends too early"),
    "weights are half": (lambda c: truncate(c / "model.safetensors"), "model.safetensors ends too early"),
    "weights are empty": (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors ends too early"),
    "weights' header is half": (lambda c: truncate(c / "model.safetensors", 0.02), "model.safetensors ends too early"),
    "weights are missing": (lambda c: (c / "model.safetensors").unlink(), "has no weights"),
    "optimizer is half": (lambda c: truncate(c / "optimizer.pt"), "optimizer.pt ends too early"),
    "scheduler is empty": (lambda c: (c / "scheduler.pt").write_bytes(b""), "scheduler.pt ends too early"),
    "random state is half": (lambda c: truncate(c / "rng_state.pth"), "rng_state.pth ends too early"),
    "state is a folder": (
        lambda c: ((c / "trainer_state.json").unlink(), (c / "trainer_state.json").mkdir()),
        "has no",
    ),
    "header is a list": (
        lambda c: (c / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"),
        "a file in it cannot be read",
    ),
    "index is a list": (lambda c: (c / "model.safetensors.index.json").write_text("[]"), "a file in it cannot be read"),
}


@pytest.mark.parametrize("damage, problem", DAMAGES.values(), ids=DAMAGES)
def test_every_kind_of_damage_is_recognised_and_nothing_is_deleted(damage, problem: str, checkpoint, caplog) -> None:
    damage(checkpoint)
    assert problem in problem_with(checkpoint)
    files = sorted(path.name for path in checkpoint.iterdir())
    (moved,) = set_aside_incomplete(checkpoint.parent)
    assert moved.name == "incomplete-checkpoint-6" and sorted(path.name for path in moved.iterdir()) == files
    assert problem in caplog.text
    assert not checkpoint.exists() and (checkpoint.parent / "checkpoint-3").exists()


def test_a_shard_that_is_missing(checkpoint) -> None:
    (checkpoint / "model.safetensors").unlink()
    tiny_mamba().save_pretrained(checkpoint, max_shard_size="4KB")
    assert problem_with(checkpoint) is None
    next(checkpoint.glob("model-00002-*")).unlink()
    assert "lacks model-00002-of" in problem_with(checkpoint)


def test_what_was_left_out_on_purpose_and_files_of_the_users_own_are_no_damage(checkpoint) -> None:
    (checkpoint / "ema.pt").write_bytes(b"a form of their own")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
        assert problem_with(checkpoint) is None


def test_a_training_of_another_process_is_left_alone_while_it_runs(checkpoint) -> None:
    truncate(checkpoint / "optimizer.pt")
    run = checkpoint.parent
    other = subprocess.Popen(["sleep", "60"])
    try:
        owner = {"pid": other.pid, "host": socket.gethostname()}
        (run / LOCK_NAME).write_text(json.dumps(owner))
        assert is_active(run) and set_aside_incomplete(run) == []
    finally:
        other.kill()
        other.wait()
    assert not is_active(run) and len(set_aside_incomplete(run)) == 1


def test_a_process_that_got_the_number_of_one_that_was_killed_is_no_training(checkpoint, monkeypatch) -> None:
    """As in a container that is started again, where the numbers begin anew and the host's name is the same."""
    truncate(checkpoint / "optimizer.pt")
    run = checkpoint.parent
    other = subprocess.Popen(["sleep", "60"])
    try:
        with monkeypatch.context() as as_the_other:
            as_the_other.setattr(os, "getpid", lambda: other.pid)
            mark_active(run)
        assert is_active(run) and set_aside_incomplete(run) == []
        owner = json.loads((run / LOCK_NAME).read_text())
        (run / LOCK_NAME).write_text(json.dumps({**owner, "start": _start_of(os.getpid())}))
        assert not is_active(run) and len(set_aside_incomplete(run)) == 1
        (run / LOCK_NAME).write_text(json.dumps(owner))
        other.kill()
        while _start_of(other.pid) == owner["start"]:
            time.sleep(0.01)
        assert not is_active(run), "it has ended, though nobody has asked for its outcome yet"
    finally:
        other.kill()
        other.wait()


def test_a_live_run_is_seen_without_a_signal(tmp_path, monkeypatch) -> None:
    """On Windows `os.kill(pid, 0)` sends Ctrl+C, and raises for most processes; psutil knows how to ask there."""
    sent = []

    class WindowsOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def kill(self, pid: int, signal_number: int) -> None:
            sent.append(signal_number)
            raise OSError(22, "[WinError 87] The parameter is incorrect")

    owner = {"pid": os.getppid(), "host": socket.gethostname(), "start": _start_of(os.getppid())}
    (tmp_path / LOCK_NAME).write_text(json.dumps(owner), encoding="utf-8")
    monkeypatch.setattr(running_mark, "os", WindowsOs())
    assert is_active(tmp_path) and sent == []
    (tmp_path / LOCK_NAME).write_text(json.dumps({**owner, "pid": 2**22 + 1}), encoding="utf-8")
    assert not is_active(tmp_path) and sent == []


def test_where_a_system_has_no_proc_the_start_is_known_too(monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError()))
    start = _start_of(os.getpid())
    assert start is not None and start == _start_of(os.getpid())
    # By their own count: two processes may start in the same tick of the clock.
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: float(process.pid))
    assert _start_of(os.getpid()) != _start_of(os.getppid())
    assert _start_of(2**22 + 1) is None, "no process has this number"


def test_a_running_training_is_marked_and_an_ended_one_is_not(tmp_path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(json.loads((tmp_path / LOCK_NAME).read_text())["pid"])

    make_trainer(tmp_path, None, callbacks=[CompreSSMCallback(TWO_CUTS), Watch()]).train()
    assert set(seen) == {os.getpid()} and not (tmp_path / LOCK_NAME).exists()
    assert not is_active(tmp_path), "one's own mark of an interrupted training is no obstacle"


def test_an_empty_safetensors_file_is_whole(tmp_path, checkpoint) -> None:
    save_file({}, checkpoint / "extra.safetensors")
    assert problem_with(checkpoint) is None


def test_names_that_are_taken_are_not_overwritten(checkpoint) -> None:
    shutil.copytree(checkpoint, checkpoint.parent / "incomplete-checkpoint-6")
    truncate(checkpoint / "optimizer.pt")
    (moved,) = set_aside_incomplete(checkpoint.parent)
    assert moved.name == "incomplete-checkpoint-6.1"


def test_folders_of_other_names_and_absent_runs_are_left_alone(tmp_path) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert set_aside_incomplete(tmp_path) == [] and set_aside_incomplete(tmp_path / "nowhere") == []
    assert (tmp_path / "checkpoint-final").is_dir()


def test_the_trainer_resumes_from_the_newest_checkpoint_that_is_whole(checkpoint) -> None:
    truncate(checkpoint / "optimizer.pt")
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, model.config.state_size))

    trainer = make_trainer(checkpoint.parent, CompreSSMCallback(TWO_CUTS), callbacks=[Watch()], **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert seen == [(3, 8)] and trainer.model.config.state_size == 2


def test_a_checkpoint_that_is_written_again_stays_whole_until_the_new_one_is(checkpoint) -> None:
    """The run goes back to step 3 and crashes while it writes step 6 again: the old one is still there."""
    old = (checkpoint / "model.safetensors").read_bytes()

    class CrashesInSave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                assert (checkpoint.parent / "replaced-checkpoint-6" / "model.safetensors").read_bytes() == old
                checkpoint.mkdir()
                (checkpoint / "model.safetensors").write_bytes(b"half")
                raise KeyboardInterrupt

    trainer = make_trainer(
        checkpoint.parent, None, callbacks=[CompreSSMCallback(TWO_CUTS), CrashesInSave()], **{**SAVES, "save_steps": 3}
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(checkpoint.parent / "checkpoint-3"))
    set_aside_incomplete(checkpoint.parent)
    assert (checkpoint / "model.safetensors").read_bytes() == old and problem_with(checkpoint) is None


def test_a_checkpoint_that_was_written_again_replaces_the_old_one(checkpoint) -> None:
    (checkpoint / "of_the_old_one").touch()
    settings = {**SAVES, "save_steps": 3}
    trainer = make_trainer(checkpoint.parent, CompreSSMCallback(TWO_CUTS), callbacks=[StopAt(6)], **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint.parent / "checkpoint-3"))
    assert not (checkpoint / "of_the_old_one").exists()
    assert not list(checkpoint.parent.glob("replaced-*"))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 6


def test_a_rename_that_the_crash_left_behind_is_undone_only_where_the_name_is_free(checkpoint) -> None:
    before_replacing(checkpoint.parent, 6)
    set_aside_incomplete(checkpoint.parent)
    assert checkpoint.is_dir() and not list(checkpoint.parent.glob("replaced-*"))
    before_replacing(checkpoint.parent, 6)
    shutil.copytree(checkpoint.parent / "replaced-checkpoint-6", checkpoint)
    set_aside_incomplete(checkpoint.parent)
    assert checkpoint.is_dir() and not list(checkpoint.parent.glob("replaced-*"))


@pytest.mark.parametrize("left", ["checkpoint-6", "replaced-checkpoint-9"])
def test_other_processes_wait_until_the_first_has_set_aside_what_a_crash_left(checkpoint, left: str) -> None:
    """As where all processes of a relaunch look for the checkpoint to resume from at once."""
    folder = checkpoint.parent
    if left == "checkpoint-6":
        truncate(checkpoint / "model.safetensors")
    else:
        checkpoint.rename(folder / left)
    first = threading.Timer(0.5, set_aside_incomplete, [folder])
    first.start()
    start = time.monotonic()
    wait_until_set_aside(folder)
    assert time.monotonic() - start > 0.4
    first.join()
    assert {path.name for path in folder.glob("*checkpoint-[69]")} <= {"incomplete-checkpoint-6", "checkpoint-9"}


def test_nobody_waits_where_nothing_is_wrong_or_nothing_happens(checkpoint) -> None:
    start = time.monotonic()
    wait_until_set_aside(checkpoint.parent)
    wait_until_set_aside(checkpoint.parent / "none")
    truncate(checkpoint / "model.safetensors")
    wait_until_set_aside(checkpoint.parent, seconds=0.3)
    assert time.monotonic() - start < 5
