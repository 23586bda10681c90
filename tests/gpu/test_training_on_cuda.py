"""Training runs on a GPU across a cut: short dtypes, scaler, rollback, resume, NCCL; skipped where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_compressm import CompreSSMCallback
from hf_compressm.architectures import find_layers
from tests.cases import TRAINED_CASES, case_id
from tests.distributed.processes import largest_difference, launch, result
from tests.training.test_callback import HALF, Notes, Rows, make_trainer
from tests.training.test_resume import SAVES, TWO_CUTS, StopAt
from tests.training.test_rollback import Judge, judged, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = {"use_cpu": False, "optim": "adamw_torch_fused", "logging_steps": 1}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
def test_a_run_goes_on_after_its_cut(case, precision: str, tmp_path) -> None:
    """fp16 with the gradient scaler, whose state goes on; float32 with the losses of the run on a CPU."""
    short = {} if precision == "float32" else {precision: True}
    notes, callback = Notes(), CompreSSMCallback(HALF)
    trainer = make_trainer(tmp_path, callback, case.build(), Rows(case.batch(batch=64)), [notes], **CUDA, **short)
    trainer.train()
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}
    assert [(r.step, r.outcome) for r in callback.records] == [(2, "cut")], callback.records[-1].reason
    assert math.isfinite(callback.records[0].loss_after) and all(map(math.isfinite, notes.losses))
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    if precision == "float32":
        here = Notes()
        rows = Rows(case.batch(batch=64))
        make_trainer(tmp_path, CompreSSMCallback(HALF), case.build(), rows, [here], **{**CUDA, "use_cpu": True}).train()
        assert notes.losses == pytest.approx(here.losses, rel=2e-2)


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
def test_a_cut_that_hurts_is_taken_back(case, tmp_path) -> None:
    callback, trainer = run(tmp_path, judged(), Judge(least=4), case.build(), Rows(case.batch(batch=64)), **CUDA)
    trainer.eval_dataset = Rows(case.batch(batch=4, seed=3))
    trainer.train()
    assert [(r.step, r.outcome) for r in callback.records] == [(4, "cut"), (8, "cut"), (8, "rolled_back")]
    assert find_layers(trainer.model)[0].state_size == 4
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
def test_a_resumed_run_gives_the_losses_of_the_uninterrupted_one(case, tmp_path) -> None:
    rows, notes = Rows(case.batch(batch=64)), {"whole": Notes(), "first": Notes(), "rest": Notes()}
    settings = {**SAVES, **CUDA, "save_steps": 7}

    def part(name: str, *more):
        callbacks = [notes[name], *more]
        return make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), case.build(), rows, callbacks, **settings)

    part("whole").train()
    part("first", StopAt(7)).train()
    part("rest").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-7"))
    assert notes["first"].losses + notes["rest"].losses == pytest.approx(notes["whole"].losses, rel=1e-3)
    assert notes["rest"].sizes[-1] == 2


def test_one_process_under_nccl_trains_as_without(tmp_path: Path) -> None:
    """All of its sums over processes go through NCCL."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, environment in (("plain", {}), ("nccl", address)):
        (tmp_path / name).mkdir()
        finished = launch(tmp_path / name, ("mamba", "mamba2"), 1, DEVICE="cuda", **environment)
        assert finished.returncode == 0, finished.stderr[-4000:]
    for case in ("mamba", "mamba2"):
        plain, nccl = (result(tmp_path / name, case, 1, 0) for name in ("plain", "nccl"))
        assert plain["sizes"] == nccl["sizes"] == [4, 4]
        assert nccl["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert largest_difference(plain, nccl) < 1e-3
