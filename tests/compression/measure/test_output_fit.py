"""Readouts of time-invariant layers fitted after a cut: brute force says what the best would be."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression.measure.output_fit import ReadoutFit
from hf_compressm.compression.processes import SingleProcess
from hf_compressm.errors import TruncationError
from tests.cases import real_valued_batch, tiny_lru, tiny_mamba, tiny_s4d, token_batch

LRU = (tiny_lru, lambda seed: token_batch(16, 40, seed))
S4D = (tiny_s4d, lambda seed: real_valued_batch(16, 60, seed))
FAMILIES = pytest.mark.parametrize(("build", "batch"), [LRU, S4D], ids=["lru", "s4d"])


def layer_outputs(model: nn.Module, batches: list[dict]) -> dict[str, list[Tensor]]:
    """What the layers give in the model as it is."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in find_layers(model)}
    handles = [
        layer.module.register_forward_hook(lambda *seen, name=layer.name: found[name].append(seen[-1]))
        for layer in find_layers(model)
    ]
    model.eval()
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def squared_errors(
    model: nn.Module, wanted: dict[str, list[Tensor]], batches: list[dict], mask=None
) -> dict[str, Tensor]:
    errors = {}
    for name, outputs in layer_outputs(model, batches).items():
        parts = [(a - b.detach()).square() for a, b in zip(outputs, wanted[name])]
        errors[name] = sum((part if mask is None else part[mask]).sum() for part in parts)
    return errors


@torch.no_grad()
def least_errors(model: nn.Module, wanted: dict[str, list[Tensor]], batches: list[dict], mask=None) -> dict[str, float]:
    """The squared error that each layer would have with the best readout, the layers before it as they are."""
    found = {}
    for layer in find_layers(model):
        C, columns = layer.module.C, []
        kept = C.clone()
        # An output channel is linear in its own row of C, so that all channels can show one entry at a time.
        for entry in [None, *range(C[0].numel())]:
            C.zero_()
            if entry is not None:
                C.view(len(C), -1)[:, entry] = 1
            columns.append(
                torch.cat(
                    [output if mask is None else output[mask] for output in layer_outputs(model, batches)[layer.name]]
                ).flatten(0, -2)
            )
        C.copy_(kept)
        skip, *features = columns
        target = torch.cat([output if mask is None else output[mask] for output in wanted[layer.name]]).flatten(0, -2)
        found[layer.name] = 0.0
        for channel in range(len(C)):
            matrix = np.stack([(feature - skip)[:, channel].numpy() for feature in features], axis=1)
            y = (target - skip)[:, channel].numpy()
            found[layer.name] += float(((y - matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0]) ** 2).sum())
    return found


def assert_best(plain: nn.Module, fitted: nn.Module, wanted: dict, batches: list[dict], mask=None) -> None:
    """The fit ends where least squares do, up to the ridge and the precision of the parameters."""
    least = least_errors(fitted, wanted, batches, mask)
    before, after = (squared_errors(one, wanted, batches, mask) for one in (plain, fitted))
    for name in wanted:
        assert least[name] <= (1 + 1e-9) * after[name] < before[name], name
        assert after[name] - least[name] < 0.05 * (before[name] - least[name]), name


def cut_copies(model: nn.Module, batches: list[dict], **settings) -> list[nn.Module]:
    """Cut without and with a fit."""
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    for fit, copied in zip((False, True), copies):
        compress(copied, batches, CompreSSMConfig(fit_readout=fit, state_size=2, **settings))
    return copies


@FAMILIES
@pytest.mark.parametrize("gramians", ["loss_gradient", "input_weighted", "closed_form"])
def test_no_readout_could_be_better_behind_the_layers_that_are_cut(build, batch, gramians) -> None:
    model, batches = build().double(), [batch(seed) for seed in range(8)]
    wanted = layer_outputs(model, batches)
    plain, fitted = cut_copies(model, batches, gramians=gramians)
    assert_best(plain, fitted, wanted, batches)


@FAMILIES
def test_only_the_readouts_differ(build, batch) -> None:
    plain, fitted = cut_copies(build(), [batch(seed) for seed in range(4)])
    for (name, one), other in zip(plain.named_parameters(), fitted.parameters()):
        assert torch.equal(one, other) != name.endswith(".C"), name
    assert plain.config.to_dict() == fitted.config.to_dict()


def test_padding_says_nothing() -> None:
    model = tiny_lru().double()
    batches = [
        {**token_batch(16, 40, seed), "attention_mask": torch.ones(16, 40, dtype=torch.long)} for seed in range(6)
    ]
    mask = torch.ones(16, 40, dtype=torch.bool)
    mask[::2, 25:] = False
    for batch in batches:
        batch["attention_mask"][~mask] = 0
        batch["labels"][~mask] = -100
    wanted = layer_outputs(model, batches)
    for name in wanted:
        # Were these steps seen, they would pull the readout far away.
        wanted[name] = [torch.where(mask.unsqueeze(-1), output, 1e3) for output in wanted[name]]
    plain, fitted = cut_copies(model, batches)
    assert_best(plain, fitted, wanted, batches, mask)


def test_by_default_a_closed_form_keeps_its_readout_and_its_bound_and_weighted_cuts_are_fitted() -> None:
    batches = [token_batch(16, 40, seed) for seed in range(2)]
    for gramians, is_fitted in (("closed_form", False), ("input_weighted", True)):
        default, plain = tiny_lru(), tiny_lru()
        compress(default, batches, CompreSSMConfig(state_size=2, gramians=gramians))
        compress(plain, batches, CompreSSMConfig(state_size=2, gramians=gramians, fit_readout=False))
        same = [torch.equal(a.module.C, b.module.C) for a, b in zip(find_layers(default), find_layers(plain))]
        assert same == [not is_fitted] * 2


def test_a_selection_keeps_its_states_as_they_are() -> None:
    plain, fitted = cut_copies(tiny_lru(), [token_batch(16, 40)], reductor="selection")
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), fitted.parameters()))


def test_trials_and_tables_of_sizes_see_what_a_cut_would_give() -> None:
    model, batches = tiny_lru(), [token_batch(16, 40, seed) for seed in range(4)]
    settings = {"state_size": 2, "compare_truncations": True}
    record = compress(model, batches, CompreSSMConfig(fit_readout=True, **settings))
    other = compress(tiny_lru(), batches, CompreSSMConfig(fit_readout=False, **settings))
    assert len(record.trials) == len(other.trials) == 2
    assert all(with_fit.loss != without.loss for with_fit, without in zip(record.trials, other.trials))


class Twice(nn.Module):
    """Runs its layers once, and from the third pass on twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.passes = tiny_lru(), 0

    def forward(self, **batch: Tensor):
        self.passes += 1
        if self.passes > 2:
            self.body(**batch)
        return self.body(**batch)


def test_layers_that_run_otherwise_than_before_stay_unfitted(caplog) -> None:
    model, plain = Twice(), tiny_lru()
    with caplog.at_level(logging.INFO, logger="hf_compressm"):
        compress(model, [token_batch()], CompreSSMConfig(state_size=2, fit_readout=True))
    compress(plain, [token_batch()], CompreSSMConfig(state_size=2, fit_readout=False))
    assert caplog.text.count("there is nothing to fit it to") == 2
    assert torch.equal(find_layers(model)[1].module.C, find_layers(plain)[1].module.C)


class TwinProcess(SingleProcess):
    """As if another process saw the same."""

    def __init__(self) -> None:
        self.calls = 0

    def sum(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return 2 * tensor


@FAMILIES
def test_a_readout_that_was_right_is_found_again_in_one_process_and_in_two(build, batch) -> None:
    for processes in (SingleProcess(), TwinProcess()):
        model, batches = build(), [batch(0), batch(1)]
        wanted = layer_outputs(model, batches)
        layers = find_layers(model)
        fit = ReadoutFit(layers, model, batches, None, processes, seed=0)
        fit.remember_outputs()
        with torch.no_grad():
            for layer in layers:
                layer.module.C.mul_(0.5)
        halved = squared_errors(model, wanted, batches)
        fit.fit([layer.name for layer in layers])
        mended = squared_errors(model, wanted, batches)
        assert all(mended[name] < 1e-4 * halved[name] for name in wanted)
    assert processes.calls == 2


def test_a_model_without_such_layers_is_not_run_for_them() -> None:
    passes = []
    model = tiny_mamba()
    model.register_forward_hook(lambda *_: passes.append(1))
    fit = ReadoutFit(find_layers(model), model, [token_batch()], None, SingleProcess(), seed=0)
    fit.remember_outputs()
    assert fit.fit([layer.name for layer in find_layers(model)]) == set() and not passes


def test_long_sequences_are_sampled(monkeypatch) -> None:
    monkeypatch.setattr("hf_compressm.compression.measure.output_fit._OUTPUTS", 16 * 16 * 10)
    monkeypatch.setattr("hf_compressm.compression.measure.output_fit._STATES", 100)
    model, batches = tiny_lru(), [token_batch(16, 40)]
    wanted = layer_outputs(model, batches)
    plain, fitted = cut_copies(model, batches)
    before, after = (squared_errors(one, wanted, batches) for one in (plain, fitted))
    assert all(after[name] < before[name] for name in wanted)


def test_a_readout_that_the_dtype_cannot_hold_changes_nothing() -> None:
    layer = find_layers(tiny_lru().half())[0]
    before = layer.module.C.clone()
    with pytest.raises(TruncationError, match="not finite"):
        layer.write_readout(torch.full_like(layer.system().C, 1e6))
    assert torch.equal(layer.module.C, before)


@FAMILIES
def test_a_written_readout_is_the_systems_readout(build, batch) -> None:
    layer = find_layers(build().double())[0]
    C = torch.randn_like(layer.system().C)
    layer.write_readout(C)
    assert torch.allclose(layer.system().C, C, rtol=1e-12)
