"""The history file."""

from __future__ import annotations

import json
import os

import pytest

from hf_compressm import read_history
from hf_compressm.compression import HISTORY_NAME, CheckRecord, LayerRecord, write_history
from hf_compressm.errors import InconsistentModelError

LAYER = LayerRecord("layers.0", "mamba", 8, 4, 3, [3.0, 1.0, 0.5, 0.1], 0.6, 0.13, None)
CUT = CheckRecord("cut", "the spectra allow it", [LAYER], 10, 2.0, 2.01, 0.5, 100, 60)


def test_round_trip(tmp_path) -> None:
    records = [CUT, CheckRecord("skipped", "the loss was nan", step=20)]
    path = write_history(records, tmp_path / "new")
    assert read_history(path.parent) == records
    assert json.loads(path.read_text())["version"] == 1


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    write_history([CUT], tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_history([CUT, CUT], tmp_path)
    assert read_history(tmp_path) == [CUT]
    assert os.listdir(tmp_path) == [HISTORY_NAME]


def test_a_summary_says_what_happened_in_one_line() -> None:
    assert CUT.summary() == (
        "step 10: state size 8 -> 4 in 1 layers, at most 13.00% of the Hankel energy beyond them, "
        "parameters 100 -> 60, calibration loss 2.0000 -> 2.0100, 0.50 s"
    )
    assert CheckRecord("skipped", "the loss was nan", step=20).summary() == "step 20: skipped, the loss was nan"


def test_scalars_are_plain_numbers() -> None:
    scalars = CUT.scalars()
    assert scalars["compressm/state_size"] == 4 and scalars["compressm/state_size/layers.0"] == 4
    assert scalars["compressm/cut"] == 1 and scalars["compressm/loss_after"] == 2.01
    assert all(type(value) is float for value in scalars.values())
    assert "compressm/loss_before" not in CheckRecord("skipped", "why").scalars()


@pytest.mark.parametrize(
    "text", ["", "{", '{"checks": [{"outcome": "cut"', "[]", '{"checks": 3}', '{"checks": [{"a": 1}]}', "\x80"]
)
def test_what_is_no_history_is_refused_by_its_path(text: str, tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path)
    (tmp_path / HISTORY_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(InconsistentModelError, match=f"{HISTORY_NAME} is not a history.*Remove or restore"):
        read_history(tmp_path)
