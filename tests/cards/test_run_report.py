"""A run as a table and a picture, while it is in memory and from its folder."""

from __future__ import annotations

import pytest

from hf_compressm import CompreSSMCallback, RunReport
from hf_compressm.cards import Provenance
from hf_compressm.compression import CheckRecord, LayerRecord
from hf_compressm.errors import InconsistentModelError
from tests.training.test_callback import make_trainer
from tests.training.test_resume import TWO_CUTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = CompreSSMCallback(TWO_CUTS)
    trainer = make_trainer(folder, callback, save_strategy="steps", save_steps=20, logging_steps=1)
    trainer.train()
    return folder, callback, trainer


def test_the_folder_tells_what_the_trainer_tells(run, tmp_path) -> None:
    folder, callback, trainer = run
    live, saved = RunReport.of(callback, trainer), RunReport.from_folder(folder)
    assert live.records == saved.records == callback.records
    assert live.table() == saved.table() and "8 -> 4" in live.table() and "4 -> 2" in live.table()
    picture = tmp_path / "run.png"
    live.plot(picture)
    assert picture.stat().st_size > 10_000


def test_the_picture_shows_spectra_sizes_and_losses_over_the_steps(run) -> None:
    folder, _, _ = run
    spectra, sizes, losses = RunReport.from_folder(folder).plot().axes
    # Two layers before the first cut, two at the last check, and the line of what was kept.
    assert [len(line.get_xdata()) for line in spectra.lines] == [8, 8, 4, 4, 2]
    (course,) = sizes.lines
    assert list(course.get_ydata()) == [8, 4, 2, 2] and list(course.get_xdata()) == [0, 5, 10, 20]
    training = losses.lines[0]
    assert len(training.get_xdata()) == 20
    cuts = [line.get_xdata()[0] for line in losses.lines if line.get_linestyle() == "--"]
    assert cuts == [5, 10]


def test_a_folder_without_a_history_is_told_so(tmp_path) -> None:
    with pytest.raises(InconsistentModelError, match="has no compressm_history.json"):
        RunReport.from_folder(tmp_path)


def test_a_history_without_a_spectrum_is_drawn_without_one() -> None:
    layers = [LayerRecord("layer", "mamba", 4, 8, 8, [], 0.0, 0.0)]
    report = RunReport("run", Provenance([CheckRecord("rolled_back", "the loss rose", layers)]))
    (spectra,) = report.plot().axes
    assert spectra.get_title() == "No spectrum was recorded" and not spectra.lines
