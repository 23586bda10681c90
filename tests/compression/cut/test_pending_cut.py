"""A cut that is not yet accepted is saved, loaded, taken back and accepted as a whole, with copies of the weights."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from hf_compressm import CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.compression import AVERAGES_NAME, SNAPSHOT_NAME, Compressor, PendingCut
from tests.cases import TRAINED_CASES, case_id, tiny_mamba, token_batch

JUDGED_LATER = CompreSSMConfig(strategy="fixed", rollback_tolerance=0.0, rollback_metric="eval_loss")


def averages_of(model) -> dict[str, Any]:
    """An average as a module and one as plain tensors, both a little beside the model's weights."""
    module = AveragedModel(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)
    tensors = {name: parameter.detach() * 0.99 for name, parameter in model.named_parameters()}
    return {"module": module, "tensors": tensors}


def values_of(averages: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    return copy.deepcopy({"module": averages["module"].module.state_dict(), "tensors": averages["tensors"]})


def cut(model, batch, averages) -> Compressor:
    compressor = Compressor(model, JUDGED_LATER, find_copies=lambda: averages, progress=False)
    assert compressor.check([batch], step=3).outcome == "cut"
    assert compressor.pending.judge_at == 3 + JUDGED_LATER.rollback_after
    return compressor


@pytest.mark.parametrize("case", TRAINED_CASES, ids=case_id)
@pytest.mark.parametrize("restart", [False, True])
def test_copies_of_the_weights_are_taken_back_to_the_bit(case, restart: bool, tmp_path) -> None:
    model = case.build()
    averages = averages_of(model)
    before = values_of(averages)
    compressor = cut(model, case.batch(), averages)
    assert {layer.state_size for layer in find_layers(averages["module"].module)} == {4}
    if restart:
        compressor.pending.save(tmp_path)
        # What a new process has: a model and averages of the smaller size that no cut has seen.
        averages.update(copy.deepcopy(averages))
        compressor.restore(compressor.records, PendingCut.load(tmp_path, judge_at=4))
    compressor.take_back("it hurt", step=4)
    after = values_of(averages)
    for name, expected in before.items():
        assert after[name].keys() == expected.keys()
        assert all(torch.equal(after[name][key], value) for key, value in expected.items()), name


def test_an_average_that_was_begun_after_the_cut_gets_the_model_s_weights(caplog) -> None:
    model = tiny_mamba()
    averages: dict[str, Any] = {}
    compressor = cut(model, token_batch(), averages)
    averages["late"] = AveragedModel(model)
    compressor.take_back("it hurt")
    for found, expected in zip(averages["late"].module.parameters(), model.parameters()):
        assert torch.equal(found, expected)
    assert "no average of the weights from before the cut for late" in caplog.text


def test_an_accepted_cut_lets_everything_go_that_it_replaced() -> None:
    model = tiny_mamba()
    averages = averages_of(model)
    compressor = cut(model, token_batch(), averages)
    replaced = weakref.ref(next(iter(compressor.pending.averages["module"].parameters.values())))
    compressor.accept()
    gc.collect()
    assert replaced() is None and compressor.pending is None
    with pytest.raises(RuntimeError, match="no snapshot"):
        compressor.take_back("too late")


def test_the_averages_lie_in_a_file_of_their_own(tmp_path) -> None:
    model = tiny_mamba()
    cut(model, token_batch(), {}).pending.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [SNAPSHOT_NAME]
    model = tiny_mamba()
    cut(model, token_batch(), averages_of(model)).pending.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [SNAPSHOT_NAME, AVERAGES_NAME]
