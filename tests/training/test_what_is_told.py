"""What a training with cuts prints and sends to trackers."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze
from hf_compressm.cards import Evaluation, Provenance, RunReport, render_card, verdict
from hf_compressm.compression.history import CheckRecord
from tests.cases import tiny_mamba, token_batch


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    """Two cuts are not needed: one at step 8 of 20, without progress bars, into TensorBoard."""
    rows = [{"input_ids": row, "labels": row} for row in token_batch(batch=16)["input_ids"]]
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0, 8))
    args = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, logging_steps=2, report_to="tensorboard",
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    return Trainer(model=tiny_mamba(8), args=args, train_dataset=rows, callbacks=[CompreSSMCallback(config)])


def test_no_progress_bars_is_no_reason_to_hide_a_cut(trainer, capsys) -> None:
    trainer.train()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[compressm]")]
    assert "state size 8 -> 4" in told[-2] and ", parameters 5,872 -> 5,104," in told[-2]
    assert told[-1].startswith("[compressm] states 8 -> 4 in 2 layers; parameters 5,872 -> 5,104 (86.9%);")
    assert "ms a step" in told[-1] and "at step 8" in told[-1]


def test_trackers_get_curves_from_the_first_step_on(trainer, monkeypatch) -> None:
    from transformers.integrations import TensorBoardCallback

    seen = []

    def note(self, args, state, control, logs=None, **kwargs):
        seen.append((state.global_step, dict(logs or {})))

    monkeypatch.setattr(TensorBoardCallback, "on_log", note)
    trainer.train()
    curve = [(step, logs["compressm/state_size"]) for step, logs in seen if "compressm/state_size" in logs]
    assert curve[0] == (0, 8.0) and (2, 8.0) in curve and (8, 4.0) in curve and curve[-1] == (20, 4.0)
    assert len({step for step, _ in curve}) >= 7, "a curve"
    assert sum("compressm/state_size" in entry for entry in trainer.state.log_history) == 1, "the check alone"


def test_the_legend_of_the_report_names_layers(trainer, tmp_path) -> None:
    trainer.train()
    spectra = RunReport.from_folder(tmp_path).plot().axes[0]
    told = [text.get_text() for text in spectra.get_legend().get_texts()]
    assert told == ["backbone.layers.0.mixer", "backbone.layers.1.mixer", "4 states kept"]


def test_the_card_names_steps_and_fits(trainer) -> None:
    trainer.train()
    records = _records(trainer)
    evaluations = [Evaluation("loss", 2.352, 2.046, "the evaluation set", before_step=50, after_step=200)]
    card = render_card(Provenance(records, evaluations=evaluations))
    assert "step 50" in card and "step 200" in card and "trained on between these evaluations" in card
    assert "fit_readout" not in card, "a cut in a training has no fit"
    layers = [replace(layer, readout_fitted=True) for layer in records[0].layers]
    fitted = CheckRecord(**{**vars(records[0]), "step": None, "layers": layers})
    assert "were fitted to the outputs" in render_card(Provenance([fitted]))
    larger = CheckRecord(**{**vars(records[0]), "parameters_after": records[0].parameters_before + 10})
    told = render_card(Provenance([larger], model_class="CompressedMamba2ForCausalLM"))
    assert "the weights are not" in told and "cut out of the weights" not in told


def _records(trainer: Trainer) -> list[CheckRecord]:
    return next(c.records for c in trainer.callback_handler.callbacks if isinstance(c, CompreSSMCallback))


def test_a_verdict_without_a_cut() -> None:
    assert verdict(Provenance([])) is None
    kept = CheckRecord("kept", "the spectra ask for 8 of 8 states")
    assert verdict(Provenance([kept])) == "nothing was cut: the spectra ask for 8 of 8 states"


def test_a_loss_worse_than_chance_is_told(caplog) -> None:
    model = tiny_mamba(8)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        analyze(model, [token_batch()])
        assert "worse than chance" in caplog.text
        caplog.clear()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        analyze(model, [token_batch()], CompreSSMConfig(gramians="white_noise"))
    assert "worse than chance" not in caplog.text
