"""Optimizers whose state is not one plain dictionary: it is carried, or a warning tells that it is not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression.cut.optimizer import drop_stale_states
from hf_compressm.compression.cut.optimizer_parts import optimizer_parts, state_of
from hf_compressm.errors import UnsupportedModelError
from tests.cases import tiny_mamba, token_batch
from tests.compression.cut.test_optimizer import train
from tests.selective_models import tiny_mamba2
from tests.training.test_callback import HALF as IN_TRAINING
from tests.training.test_callback import Rows, arguments

HALF = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)


def split(model: nn.Module) -> tuple[list, list]:
    """The matrices inside the layers, which Muon takes, and all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    return matrices, [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]


class Chained(torch.optim.Optimizer):
    """Two optimizers behind one face, whose groups and state are put together anew at each look."""

    def __init__(self, model: nn.Module) -> None:
        matrices, rest = split(model)
        self.chained = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
        self.defaults = {}

    @property
    def param_groups(self):
        return [group for part in self.chained for group in part.param_groups]

    @property
    def state(self):
        return {parameter: state for part in self.chained for parameter, state in part.state.items()}

    def step(self, closure=None):
        for part in self.chained:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.chained:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.chained]}

    def load_state_dict(self, state):
        for part, saved in zip(self.chained, state["parts"], strict=True):
            part.load_state_dict(saved)


class WithAnInnerOne(torch.optim.Muon):
    """Muon that holds an AdamW for what is no matrix, in an attribute, and shows its own groups alone."""

    def __init__(self, model: nn.Module) -> None:
        matrices, rest = split(model)
        super().__init__(matrices, lr=1e-3)
        self.others = torch.optim.AdamW(rest, lr=1e-3)

    def step(self, closure=None):
        self.others.step()
        return super().step(closure)


class Plain:
    """No torch optimizer at all: a list of them, with a `step`."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = Chained(model).chained

    def step(self):
        for part in self.optimizers:
            part.step()

    def zero_grad(self):
        for part in self.optimizers:
            part.zero_grad()


CHAINS = {"merged": Chained, "inner": WithAnInnerOne, "list": Plain}


def moments(optimizer, model: nn.Module) -> dict[str, dict]:
    return {name: dict(state_of(optimizer, p) or {}) for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [tiny_mamba, tiny_mamba2], ids=["mamba", "mamba2"])
@pytest.mark.parametrize("name", CHAINS)
def test_every_part_of_a_chain_is_carried(name: str, build, caplog) -> None:
    model = build()
    optimizer = CHAINS[name](model)
    train(model, optimizer, 3)
    before = moments(optimizer, model)
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        record = compress(model, [token_batch()], HALF, optimizer)
    assert record.outcome == "cut" and {layer.state_size for layer in find_layers(model)} == {4}
    assert not [entry for entry in caplog.records if entry.name.startswith("hf_compressm.compression.cut")]
    after = moments(optimizer, model)
    added = after.keys() - before.keys()
    assert {key for key, state in after.items() if not state} == added
    for key, parameter in model.named_parameters():
        for value in after[key].values():
            assert value.numel() == 1 or value.shape == parameter.shape
    held = [p for part in optimizer_parts(optimizer) for group in part.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    known = {id(p) for part in optimizer_parts(optimizer) for p in part.state}
    assert known <= {id(p) for p in model.parameters()}, "nothing old is left behind"
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = train(model, optimizer, 3)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(not torch.equal(weights[key], p) for key, p in model.named_parameters()), "all are trained on"


def test_a_chain_is_taken_back_with_its_moments() -> None:
    model = tiny_mamba()
    optimizer = Chained(model)
    train(model, optimizer, 3)
    before = {key: {k: v.clone() for k, v in state.items()} for key, state in moments(optimizer, model).items()}
    worse = iter([1.0, 2.0])
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, rollback_tolerance=0.0)
    record = compress(
        model, [token_batch()], config, optimizer, loss_function=lambda m, b: m(**b).loss * 0 + next(worse)
    )
    assert record.outcome == "rolled_back"
    after = moments(optimizer, model)
    assert after.keys() == before.keys()
    for key, state in before.items():
        for name, value in state.items():
            assert torch.equal(after[key][name], value), (key, name)


def test_a_chain_is_carried_in_a_run(tmp_path) -> None:
    model = tiny_mamba2()
    optimizer = Chained(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.chained[1], lambda step: 1.0)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=6), train_dataset=Rows(token_batch(batch=32)),
        callbacks=[CompreSSMCallback(IN_TRAINING)], optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    assert {layer.state_size for layer in find_layers(model)} == {4}
    assert all(moments(optimizer, model).values())


def test_stale_states_of_every_part_are_dropped() -> None:
    model = tiny_mamba()
    optimizer = Chained(model)
    train(model, optimizer, 2)
    weight = model.backbone.layers[0].mixer.x_proj.weight
    with torch.no_grad():
        weight.data = weight.data[:-2].clone()
    assert drop_stale_states(optimizer) == 1 and state_of(optimizer, weight) is None


def test_parameters_in_no_part_are_refused() -> None:
    model = tiny_mamba()
    optimizer = Chained(model)
    optimizer.chained.pop(0)
    with pytest.raises(UnsupportedModelError, match="4 of the 4 parameters that would be cut are not in Chained"):
        compress(model, [token_batch()], HALF, optimizer)


class Private(torch.optim.SGD):
    """Keeps its momenta to itself, by the tensors, and shows a copy."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=1e-3)
        self._mine: dict = {}

    @property
    def state(self):
        return {p: {"momentum_buffer": buffer} for p, buffer in getattr(self, "_mine", {}).items()}

    @state.setter
    def state(self, value) -> None:
        pass

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                self._mine[p] = self._mine.get(p, 0.0) * 0.9 + p.grad
                p -= 1e-3 * self._mine[p]


def test_a_state_that_cannot_be_reached_is_told_of(caplog) -> None:
    model = tiny_mamba()
    optimizer = Private(model.parameters())
    train(model, optimizer, 2)
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        assert compress(model, [token_batch()], HALF, optimizer).outcome == "cut"
    [told] = [entry.getMessage() for entry in caplog.records if entry.name.startswith("hf_compressm.compression.cut")]
    assert "Private does not keep its state in a dictionary that can be written to" in told and "lost" in told
    train(model, optimizer, 2)


class EightBit(torch.optim.Optimizer):
    """What bitsandbytes' 8-bit Adam keeps: codes in blocks, and the scale of each block."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                old = state["state1"].float() * state["absmax1"] / 127 if state else torch.zeros_like(p)
                new = 0.9 * old + 0.1 * p.grad
                scale = new.abs().max()
                state.update(step=1, absmax1=scale.reshape(1), qmap1=torch.linspace(-1, 1, 256))
                state["state1"] = (new / scale.clamp_min(1e-9) * 127).round().to(torch.int8)
                p -= 1e-3 * new


def test_eight_bit_moments_are_reset_with_a_warning_and_the_others_stay(caplog) -> None:
    model = tiny_mamba()
    optimizer = EightBit(model.parameters())
    train(model, optimizer, 2)
    kept = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        compress(model, [token_batch()], HALF, optimizer)
    assert "EightBit keeps a state 'qmap1'" in caplog.text or "EightBit keeps a state 'state1'" in caplog.text
    for name, p in model.named_parameters():
        if "A_log" in name or "x_proj" in name:
            assert optimizer.state.get(p, {}) == {}
        else:
            assert optimizer.state[p].keys() == kept[name].keys()
    train(model, optimizer, 2)


class ScheduleFree(torch.optim.Optimizer):
    """Case 25: the state z holds weights; the model is trained at y and evaluated at their average x."""

    beta = 0.9

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.detach().clone())
                x = (y - (1 - self.beta) * z) / self.beta
                z.sub_(group["lr"] * y.grad)
                y.copy_(self.beta * (x + (z - x) / group["k"]) + (1 - self.beta) * z)

    @torch.no_grad()
    def eval(self) -> None:
        for y in (p for group in self.param_groups for p in group["params"]):
            y.copy_((y - (1 - self.beta) * self.state[y].get("z", y.clone())) / self.beta)


@pytest.mark.parametrize("build", [tiny_mamba, tiny_mamba2], ids=["mamba", "mamba2"])
def test_schedule_free_training_goes_on_and_the_reset_is_told_of(build, caplog) -> None:
    model, batch = build(), token_batch(batch=8)
    optimizer, losses = ScheduleFree(model.parameters(), lr=0.2), []
    for step in range(30):
        if step == 15:
            with caplog.at_level(logging.WARNING, "hf_compressm"):
                assert compress(model, [batch], HALF, optimizer).outcome == "cut"
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(optimizer.state[p]["z"].shape == p.shape for p in model.parameters())
    assert losses[-1] < losses[14]
    optimizer.eval()
    assert model(**batch).loss.item() < losses[14] + 0.05
    # A mixed cut replaces no parameter of Mamba-2, and its new ones start afresh.
    assert ("ScheduleFree keeps a state 'z'" in caplog.text) == (build is tiny_mamba)
