"""The checkpoint that the Trainer writes on SIGTERM (`enable_jit_checkpoint`), past the callbacks' `on_save`."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.architectures import find_layers
from hf_compressm.compression import LAYERS_NAME, SNAPSHOT_NAME
from tests.cases import tiny_mamba
from tests.training.test_callback import Notes, make_trainer
from tests.training.test_features import with_adapter
from tests.training.test_resume import TWO_CUTS
from tests.training.test_rollback import SLOW, Judge, judged
from tests.training.test_rollback import run as judged_run

SETTINGS = {"enable_jit_checkpoint": True, "logging_steps": 1, "lr_scheduler_type": "cosine"}


class Terminate(TrainerCallback):
    """Asks for the checkpoint as the Trainer's handler of SIGTERM does, at one moment of one step."""

    def __init__(self, event: str, step: int) -> None:
        self.trainer = None
        setattr(self, event, self._ask)
        self._step = step

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            held = self.trainer.callback_handler.callbacks
            [stock] = [callback for callback in held if isinstance(callback, JITCheckpointCallback)]
            stock.jit_manager.is_checkpoint_requested = True


# In its step the stock callback comes before this library's: once before an optimizer step, once after it.
@pytest.mark.parametrize("event, step, saved", [("on_step_begin", 7, 7), ("on_optimizer_step", 4, 5)])
@pytest.mark.parametrize("build", [tiny_mamba, lambda: with_adapter(["in_proj"])], ids=["whole", "adapter"])
def test_a_terminated_run_resumes_as_if_it_had_not_been(event: str, step: int, saved: int, build, tmp_path) -> None:
    whole, rest, terminate = Notes(), Notes(), Terminate(event, step)
    uninterrupted = CompreSSMCallback(TWO_CUTS)
    make_trainer(tmp_path / "a", uninterrupted, build(), None, [whole], **SETTINGS).train()
    first = make_trainer(tmp_path / "b", CompreSSMCallback(TWO_CUTS), build(), None, [terminate], **SETTINGS)
    terminate.trainer = first
    first.train()
    [checkpoint] = (tmp_path / "b").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{saved}"
    assert (checkpoint / LAYERS_NAME).is_file() == (checkpoint / "adapter_config.json").is_file()
    callback = CompreSSMCallback(TWO_CUTS)
    second = make_trainer(tmp_path / "b", callback, build(), None, [rest], **SETTINGS)
    second.train(resume_from_checkpoint=True)
    assert {layer.state_size for layer in find_layers(second.model)} == {2}
    assert [record.step for record in callback.records] == [record.step for record in uninterrupted.records]
    assert rest.losses[-(20 - saved) :] == pytest.approx(whole.losses[saved:], rel=1e-4)


@pytest.mark.parametrize("event, step, saved", [("on_step_begin", 6, 6), ("on_optimizer_step", 8, 9)])
def test_a_pending_cut_is_taken_back_after_the_restart(event: str, step: int, saved: int, tmp_path) -> None:
    """The cut of step 4 is judged in step 9."""
    callback, trainer = judged_run(tmp_path / "whole", judged(**SLOW), Judge(8))
    trainer.train()
    terminate = Terminate(event, step)
    settings = {"enable_jit_checkpoint": True}
    _, first = judged_run(tmp_path / "parts", judged(**SLOW), Judge(8), **settings)
    first.add_callback(terminate)
    terminate.trainer = first
    first.train()
    assert (tmp_path / "parts" / f"checkpoint-{saved}" / SNAPSHOT_NAME).is_file()
    resumed, second = judged_run(tmp_path / "parts", judged(**SLOW), Judge(8), **settings)
    second.train(resume_from_checkpoint=True)
    assert [record.outcome for record in resumed.records] == [record.outcome for record in callback.records]
    assert [record.outcome for record in resumed.records] == ["cut", "rolled_back"]
    assert {layer.state_size for layer in find_layers(second.model)} == {8}
