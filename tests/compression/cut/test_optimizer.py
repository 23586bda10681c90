"""Moments carried across a cut."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import Adafactor

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import AxisMap, ParameterChange, successor
from hf_compressm.compression.cut.optimizer import (
    OptimizerChange,
    drop_stale_states,
    require_matching_states,
    unwrap_optimizer,
)
from hf_compressm.compression.cut.optimizer_moments import carry_state
from hf_compressm.errors import UnsupportedModelError
from tests.cases import tiny_mamba, token_batch

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
    "adafactor-momentum": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9),
    "adafactor-torch": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_carried_moments(name: str, caplog) -> None:
    model = tiny_mamba()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    states = len(optimizer.state)
    with caplog.at_level(logging.WARNING):
        record = compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", keep_ratio=0.4), optimizer)
    assert record.outcome == "cut"
    assert not [entry for entry in caplog.records if entry.name.startswith("hf_compressm.compression.cut")]
    assert len(optimizer.state) == states
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    require_matching_states(optimizer)
    x_proj = model.backbone.layers[0].mixer.x_proj.weight
    before = x_proj.detach().clone()
    assert all(torch.isfinite(torch.tensor(train(model, optimizer, 3))))
    assert not torch.equal(before, x_proj), "the new parameter is trained"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cut_to_full_size_is_invisible_to_the_optimizer(name: str) -> None:
    """Replacing every parameter by its copy leaves the trajectory as it is."""
    losses = []
    for replace in (False, True):
        model = tiny_mamba()
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, 2)
        if replace:
            for module in model.modules():
                for key, old in list(module._parameters.items()):
                    if old is None or key not in ("A_log",):
                        continue
                    new = successor(old, old.detach())
                    change = OptimizerChange(
                        optimizer, [ParameterChange(old, new, AxisMap(1, torch.eye(8, dtype=torch.float64)))]
                    )
                    change.commit()
                    setattr(module, key, new)
        losses.append(train(model, optimizer, 3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def some_change(rows: int = 5, columns: int = 4, kept: int = 3) -> ParameterChange:
    old = nn.Parameter(torch.randn(rows, columns))
    M = torch.randn(kept, rows, dtype=torch.float64)
    return ParameterChange(old, successor(old, M @ old.detach().double()), AxisMap(0, M))


def test_adam_moments_are_mapped_with_M_and_its_squares() -> None:
    change = some_change()
    M = change.moment_map.matrix
    first, second = torch.randn(5, 4), torch.rand(5, 4)
    state = carry_state({"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second}, change)
    torch.testing.assert_close(state["exp_avg"], (M @ first.double()).float())
    torch.testing.assert_close(state["exp_avg_sq"], (M**2 @ second.double()).float())
    assert state["step"] == 7


@pytest.mark.parametrize("keep_axis", [False, True])
def test_factored_moments_are_mapped_along_the_axis_that_they_have(keep_axis: bool) -> None:
    change = some_change()
    M = change.moment_map.matrix
    row, column = torch.rand(5), torch.rand(4)
    names = ("row_var", "col_var") if keep_axis else ("exp_avg_sq_row", "exp_avg_sq_col")
    shapes = ((5, 1), (1, 4)) if keep_axis else ((5,), (4,))
    state = carry_state(
        {names[0]: row.reshape(shapes[0]), names[1]: column.reshape(shapes[1]), "RMS": 0.1, "step": 3}, change
    )
    expected = (M**2 @ row.double()).float()
    torch.testing.assert_close(state[names[0]], expected.reshape((3, 1) if keep_axis else (3,)))
    torch.testing.assert_close(state[names[1]].flatten(), column * (expected.mean() / row.mean()))
    assert state["RMS"] == 0.1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep_axis", [False, True])
def test_adafactor_estimates_the_kept_entries_as_before(axis: int, keep_axis: bool) -> None:
    """A second moment of rank one is what Adafactor holds exactly; a selection must not change what it says."""
    old, kept = nn.Parameter(torch.randn(5, 4)), torch.tensor([0, 2])
    picked = torch.eye(old.shape[axis], dtype=torch.float64)[kept]
    change = ParameterChange(old, successor(old, old.detach().index_select(axis, kept)), AxisMap(axis, picked, kept))
    row, column = torch.rand(5) + 0.1, torch.rand(4) + 0.1
    names = ("row_var", "col_var") if keep_axis else ("exp_avg_sq_row", "exp_avg_sq_col")
    shapes = ((-1, 1), (1, -1)) if keep_axis else ((-1,), (-1,))
    state = carry_state({names[0]: row.reshape(shapes[0]), names[1]: column.reshape(shapes[1])}, change)

    def estimate(row, column):
        return row.reshape(-1, 1) * column.reshape(1, -1) / row.mean()

    expected = estimate(row, column).index_select(axis, kept)
    torch.testing.assert_close(estimate(state[names[0]], state[names[1]]), expected)


@pytest.mark.parametrize(
    "state", [{"square_avg": torch.rand(5, 4), "name": "momentum_buffer"}, {"RMS": 1.0, "name": "exp_avg"}]
)
def test_averages_of_normalised_updates_keep_their_size(state: dict) -> None:
    change = some_change()
    name = state.pop("name")
    updates = torch.randn(5, 4)
    carried = carry_state({**state, name: updates}, change)
    assert torch.equal(carried[name], updates[:3]), "the leading entries, where the map does not say which are kept"


@pytest.mark.parametrize("moments", ["carry", "slice", "reset"])
def test_the_setting_decides_what_happens_to_the_moments(moments: str) -> None:
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    old = model.backbone.layers[0].mixer.x_proj.weight
    before = optimizer.state[old]["exp_avg"].clone()
    other = model.backbone.layers[0].mixer.in_proj.weight
    kept_elsewhere = optimizer.state[other]["exp_avg"].clone()
    settings = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, optimizer_moments=moments)
    compress(model, [token_batch()], settings, optimizer)
    new = model.backbone.layers[0].mixer.x_proj.weight
    assert torch.equal(optimizer.state[other]["exp_avg"], kept_elsewhere)
    if moments == "reset":
        assert optimizer.state[new] == {}
        return
    after = optimizer.state[new]["exp_avg"]
    assert after.shape == new.shape and torch.equal(after[:3], before[:3]), "the time step's rows are untouched"
    is_row_of_before = [(row == before).all(1).any().item() for row in after[3:7]]
    assert all(is_row_of_before) == (moments == "slice")


def test_states_of_parameters_that_changed_their_size_are_dropped() -> None:
    model = tiny_mamba()
    for name in OPTIMIZERS:
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, 1)
        assert drop_stale_states(optimizer) == 0
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    parameter = model.backbone.layers[0].mixer.A_log
    parameter.data = parameter.data.new_zeros(32, 12)
    others = len(optimizer.state) - 1
    assert drop_stale_states(optimizer) == 1 and parameter not in optimizer.state and len(optimizer.state) == others


def test_an_unknown_state_is_reset_with_a_warning_that_names_it(caplog) -> None:
    change = some_change()
    with caplog.at_level(logging.WARNING):
        state = carry_state({"step": 3, "shampoo_blocks": torch.zeros(2, 2)}, change, "Shampoo")
    assert state == {}
    assert "Shampoo" in caplog.text and "shampoo_blocks" in caplog.text and "reset" in caplog.text


def test_without_a_map_the_state_is_reset(caplog) -> None:
    change = some_change()
    with caplog.at_level(logging.INFO):
        assert carry_state({"exp_avg": torch.zeros(5, 4)}, ParameterChange(change.old, change.new)) == {}
    assert "reset" in caplog.text


def test_parameter_groups_keep_their_settings_and_their_order() -> None:
    model = tiny_mamba()
    decay = [p for name, p in model.named_parameters() if "A_log" not in name]
    no_decay = [p for name, p in model.named_parameters() if "A_log" in name]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "lr": 7e-4}], lr=1e-3)
    train(model, optimizer, 1)
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", keep_ratio=0.5), optimizer)
    after = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert [len(group) for group in shapes] == [len(group) for group in after]
    assert after[1] == [(32, 4), (32, 4)] and optimizer.param_groups[1]["lr"] == 7e-4
    assert [shape for shape in after[0] if shape not in shapes[0]] == [(11, 32), (11, 32)]


def test_rollback_puts_everything_back() -> None:
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 2)
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    old = model.backbone.layers[0].mixer.A_log
    picked = torch.eye(8, dtype=torch.float64)[:3]
    change = OptimizerChange(optimizer, [ParameterChange(old, successor(old, old.detach()[:, :3]), AxisMap(1, picked))])
    change.commit()
    assert old not in optimizer.state
    change.rollback()
    assert all(a is b for x, y in zip(parameters, [g["params"] for g in optimizer.param_groups]) for a, b in zip(x, y))
    assert optimizer.state.keys() == states.keys()
    assert optimizer.state[old]["exp_avg"] is states[old]["exp_avg"]


def test_wrappers_are_opened() -> None:
    class Wrapper:
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert unwrap_optimizer(Wrapper(Wrapper(inner))) is inner


def test_an_optimizer_of_other_tensors_is_refused_before_anything_changes() -> None:
    model = tiny_mamba()
    flat = torch.optim.SGD([nn.Parameter(torch.zeros(10))], lr=0.1)
    with pytest.raises(UnsupportedModelError, match="4 of the 4 parameters that would be cut are not in SGD"):
        compress(model, [token_batch()], CompreSSMConfig(strategy="fixed"), flat)
    assert model.config.state_size == 8 and model.backbone.layers[0].mixer.A_log.shape == (32, 8)


def test_a_moment_of_another_shape_is_noticed() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    optimizer.state[parameter] = {"exp_avg": torch.zeros(4)}
    with pytest.raises(AssertionError, match=r"shape \(4,\) for a parameter of shape \(3,\)"):
        require_matching_states(optimizer)
