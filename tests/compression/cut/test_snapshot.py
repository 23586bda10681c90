"""What a cut replaces can be put back, at once or after a restart, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from hf_compressm import CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.compression import SNAPSHOT_NAME, Compressor, PendingCut, Snapshot
from hf_compressm.errors import DimensionError
from tests.cases import CASES, case_id, tiny_mamba, token_batch
from tests.compression.test_compressor import assert_unchanged, snapshot

JUDGED_LATER = CompreSSMConfig(strategy="fixed", rollback_tolerance=0.0, rollback_metric="eval_loss")


def train(model, optimizer, batch: dict, steps: int = 2) -> None:
    model.train()
    for _ in range(steps):
        output = model(**batch)
        (output.loss if hasattr(output, "loss") else output[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def cut_model(case, optimizer_class=torch.optim.AdamW, stock: bool = True):
    model, batch = case.build(), case.batch()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    train(model, optimizer, batch)
    before = snapshot(model)
    states = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    compressor = Compressor(model, replace(JUDGED_LATER, stock=stock), optimizer=optimizer, progress=False)
    assert compressor.check([batch], step=3).outcome == "cut"
    return model, batch, optimizer, compressor, before, states


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("stock", [False, True])
def test_taking_a_cut_back_restores_weights_optimizer_and_sizes(case, stock: bool, restart: bool, tmp_path) -> None:
    model, _, optimizer, compressor, before, states = cut_model(case, stock=stock)
    if restart:
        compressor.pending.save(tmp_path)
        compressor.restore(compressor.records, PendingCut.load(tmp_path))
    record = compressor.take_back("it hurt", step=3)
    assert (record.outcome, record.reason, record.step) == ("rolled_back", "it hurt", 3)
    assert [(layer.size_before, layer.size_after) for layer in record.layers] == [(4, 8)] * case.layers
    after = snapshot(model)
    assert after["sizes"] == before["sizes"] and after["config"] == before["config"]
    assert all(torch.equal(before["tensors"][name], tensor) for name, tensor in after["tensors"].items())
    for parameter, expected in zip(model.parameters(), states):
        found = optimizer.state[parameter]
        assert found.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(found[key]), value) for key, value in expected.items())
    assert compressor.pending is None


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_training_after_the_cut_does_not_reach_the_snapshot(case) -> None:
    model, batch, optimizer, compressor, before, _ = cut_model(case)
    steps = {float(state["step"]) for state in compressor.pending.model.states.values()}
    train(model, optimizer, batch, steps=3)
    compressor.take_back("it hurt")
    layers = find_layers(model)
    for layer in layers:
        for name, parameter in layer.state_parameters().items():
            assert torch.equal(parameter, before["tensors"][f"{layer.name}.{name}"])
            assert {float(optimizer.state[parameter]["step"])} == steps
    train(model, optimizer, batch)


def test_a_snapshot_costs_what_the_cut_parameters_and_their_moments_cost() -> None:
    model = tiny_mamba()
    layers = find_layers(model)
    parameters = [p for layer in layers for p in layer.state_parameters().values()]
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, token_batch())
    taken = Snapshot.of(layers, optimizer)
    scalars = 4 * len(parameters)
    assert taken.nbytes() == 3 * sum(p.nbytes for p in parameters) + scalars
    held = {p.data_ptr() for p in parameters}
    assert {tensor.data_ptr() for tensor in taken.parameters.values()} == held, "no copies"


def test_no_snapshot_is_kept_where_nothing_is_judged() -> None:
    compressor = Compressor(tiny_mamba(), CompreSSMConfig(strategy="fixed"), progress=False)
    compressor.check([token_batch()])
    assert compressor.pending is None
    with pytest.raises(RuntimeError, match="no snapshot"):
        compressor.take_back("why")


def test_the_file_is_safetensors_and_replaces_the_old_one_as_a_whole(tmp_path) -> None:
    layers = find_layers(tiny_mamba())
    for _ in range(2):
        path = Snapshot.of(layers).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [SNAPSHOT_NAME] and path.name == SNAPSHOT_NAME
    with safe_open(path, framework="pt") as file:
        assert len(list(file.keys())) == 4


def test_a_snapshot_of_another_model_is_refused_before_anything_changes() -> None:
    model = tiny_mamba()
    before = snapshot(model)
    other = Snapshot.of(find_layers(tiny_mamba(hidden_size=8)))
    with pytest.raises(DimensionError, match=r"A_log has shape \(16, 8\) in the snapshot"):
        other.reductions(find_layers(model))
    assert_unchanged(model, before)
