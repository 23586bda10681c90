"""LRU and S4D layers behind the contract: systems, cuts, moments, reloading."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import StateSpaceLayer, find_layers
from hf_compressm.compression import OptimizerChange
from hf_compressm.compression.cut.changes import ModelChange, commit_together
from hf_compressm.compression.measure.layer_gramians import ClosedFormGramians
from hf_compressm.errors import DimensionError, TruncationError, UnsupportedModelError
from hf_compressm.models import LRUConfig, LRUForSequenceClassification, S4DConfig, S4DForSequenceClassification
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    error_bound,
    project,
    response_error,
    selection_truncation,
    verification_frequencies,
)
from tests.cases import logits_of, real_valued_batch, tiny_lru, tiny_s4d, token_batch

FAMILIES = {
    "lru": lambda **s: LRUForSequenceClassification(LRUConfig(**s)),
    "s4d": lambda **s: S4DForSequenceClassification(S4DConfig(**s)),
    "s4d-bilinear": lambda **s: S4DForSequenceClassification(S4DConfig(discretization="bilinear", init="inv", **s)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
SIZES = {"input_size": 1, "hidden_size": 6, "state_size": 16, "num_hidden_layers": 2, "num_labels": 3, "dropout": 0.0}


@torch.enable_grad()
def build(family: str, trained: bool = False, seed: int = 0, **overrides) -> nn.Module:
    """A tiny classifier, on request after some steps of training at a high rate."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**{**SIZES, **overrides})
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            labels = torch.randint(0, 3, (16,))
            values = torch.randn(16, 40, 1) + torch.sin(0.3 * (1 + labels)[:, None, None] * torch.arange(40.0)[:, None])
            optimizer.zero_grad()
            model(input_values=values, labels=labels).loss.backward()
            optimizer.step()
    return model.eval()


def inputs(length: int = 60) -> Tensor:
    return torch.randn(5, length, 1, generator=torch.Generator().manual_seed(3))


def apply(model: nn.Module, reductions: list, optimizer: torch.optim.Optimizer | None = None) -> None:
    change = ModelChange(model, reductions)
    commit_together([change] if optimizer is None else [change, OptimizerChange(optimizer, change.parameters)])


def truncation_of(layer: StateSpaceLayer, rank: int, reductor: str = "balanced", rule: str = "largest") -> Truncation:
    config = CompreSSMConfig(reductor=reductor, selection_rule=rule)
    return ClosedFormGramians(layer.system()).truncate(rank, reductor, config)


def repeat_states(model: nn.Module) -> nn.Module:
    """The same function with every state twice, each of the two with a part of the readout."""
    for layer in find_layers(model):
        module, half = layer.module, layer.state_size // 2
        for name, parameter in layer.state_parameters().items():
            axis = layer.state_shapes(layer.state_size)[name].index(layer.state_size)
            kept = parameter.detach().narrow(axis, 0, half)
            parts = (0.3 * kept, 0.7 * kept) if name == "C" else (kept, kept)
            parameter.data.copy_(torch.cat(parts, axis))
        assert module.state_size == 2 * half
    return model


@each_family
@torch.no_grad()
def test_the_system_is_what_the_layer_computes(family: str) -> None:
    layer = find_layers(build(family, trained=True))[1]
    u = torch.randn(2, 80, 6)
    system = layer.system()
    if system.batch_shape:
        simulated = system.simulate(u.transpose(1, 2).unsqueeze(-1)).real.squeeze(-1).transpose(1, 2)
    else:
        simulated = system.simulate(u).real + u * layer.module.D
    torch.testing.assert_close(layer.module(u).double(), simulated, atol=1e-4, rtol=1e-4)


@each_family
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("rank", [1, 5, 11, 15])
@torch.no_grad()
def test_every_cut_is_stable_and_keeps_its_bound(family: str, trained: bool, rank: int) -> None:
    for seed in range(2):
        model = build(family, trained, seed)
        for layer in find_layers(model):
            full = layer.system()
            reduction = layer.reduce(truncation_of(layer, rank))
            assert reduction.state_size == rank
            apply(model, [reduction])
            reduced = layer.system()
            assert reduced.order == layer.state_size == rank
            assert reduced.is_stable()
            omega = verification_frequencies(full, reduced)
            sigma = full.hankel_singular_values()
            bound = torch.as_tensor(error_bound(sigma, rank))
            # Written in float32, so some thousandths of the response come on top.
            assert (response_error(full, reduced, omega).amax(-1) <= bound + 2e-3 * sigma[..., 0]).all()
        assert model(input_values=inputs()).logits.isfinite().all()


@each_family
@torch.no_grad()
def test_states_that_add_nothing_are_cut_without_a_trace(family: str) -> None:
    model = repeat_states(build(family))
    expected = model(input_values=inputs()).logits
    record = compress(model, [], CompreSSMConfig(tolerance=1e-6))
    assert record.outcome == "cut", record.reason
    assert model.config.state_size == 8
    torch.testing.assert_close(model(input_values=inputs()).logits, expected, atol=2e-5, rtol=2e-4)


@each_family
@pytest.mark.parametrize("reductor", ["balanced", "selection"])
@torch.no_grad()
def test_a_cut_to_full_size_changes_nothing(family: str, reductor: str) -> None:
    model = build(family, trained=True)
    expected = model(input_values=inputs()).logits
    apply(model, [layer.reduce(truncation_of(layer, 16, reductor)) for layer in find_layers(model)])
    assert torch.equal(model(input_values=inputs()).logits, expected)


@each_family
@torch.no_grad()
def test_poles_written_and_read_back_are_the_reduced_ones(family: str) -> None:
    """A change of basis alone: full rank, states mixed."""
    layer = find_layers(build(family, trained=True))[0]
    full = layer.system()
    swap = torch.eye(16, dtype=torch.complex128).flip(0) * torch.polar(
        torch.linspace(0.5, 2, 16, dtype=torch.float64), torch.linspace(0, 6, 16, dtype=torch.float64)
    )
    T = swap.expand(*full.batch_shape, 16, 16).clone()
    truncation = Truncation(T=T, W=torch.linalg.inv(T).mH)
    reduced = project(full, truncation)
    reduction = layer.reduce(truncation)
    for change in reduction.parameters:
        assert change.new.shape == change.old.shape
    apply(layer.module, [reduction])
    torch.testing.assert_close(layer.system().lam, reduced.lam, atol=1e-6, rtol=1e-6)
    omega = verification_frequencies(full)
    torch.testing.assert_close(
        layer.system().frequency_response(omega), full.frequency_response(omega), atol=1e-3, rtol=1e-3
    )


def test_lru_angles_gamma_and_scale_are_as_promised() -> None:
    model = build("lru", trained=True)
    layer = find_layers(model)[0]
    usual = layer.module.B.detach().square().sum((1, 2)).mean().sqrt()

    def gains() -> torch.Tensor:
        return layer.module.gamma_log.detach().double().exp() / (1 - layer.system().lam.abs() ** 2).sqrt()

    # Relative to what it was before, and in two cuts as in one.
    gain = gains().log().mean().exp()
    for kept in (12, 7):
        apply(model, [layer.reduce(truncation_of(layer, kept))])
        theta = layer.module.theta_log.exp()
        assert ((theta > 0) & (theta <= 2 * math.pi + 1e-6)).all()
        torch.testing.assert_close(gains(), (gain * 16 / kept).expand(kept), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.module.B.square().sum((1, 2)).sqrt(), usual.expand(kept), atol=1e-4, rtol=1e-4)


def test_adam_moves_the_output_of_a_cut_lru_as_before() -> None:
    """An equal step for every entry of C moves it by the sum of their gradients' absolute values."""
    model = repeat_states(build("lru"))
    layer = find_layers(model)[0]
    B = layer.module.B
    B.data.div_(torch.linalg.vector_norm(B.detach(), dim=(1, 2), keepdim=True))
    u, weights = torch.randn(2, 3, 40, 6)

    def slope() -> Tensor:
        model.zero_grad()
        (layer.module(u) * weights).sum().backward()
        return layer.module.C.grad.abs().sum()

    before = slope()
    first = torch.eye(16, 8, dtype=torch.complex128)
    apply(model, [layer.reduce(Truncation(T=first, W=first.clone()))])
    torch.testing.assert_close(slope(), before, atol=1e-4, rtol=1e-4)


@each_family
def test_first_moments_move_as_the_gradients_do(family: str) -> None:
    """States exactly doubled: the gradient of the small model is the image of that of the large one."""
    model = repeat_states(build(family, norm="layer"))
    labels = torch.tensor([0, 1, 2, 0, 1])
    model(input_values=inputs(), labels=labels).loss.backward()
    layers = find_layers(model)
    reductions = [layer.reduce(truncation_of(layer, 8)) for layer in layers]
    expected = {}
    for layer, reduction in zip(layers, reductions):
        for name, change in zip(layer.state_parameters(), reduction.parameters):
            if change.moment_map is not None:
                expected[layer.name, name] = change.moment_map.first(change.old.grad)
    assert {name for _, name in expected} == ({"B", "C"} if family == "lru" else {"C"})
    apply(model, reductions)
    model.zero_grad()
    model(input_values=inputs(), labels=labels).loss.backward()
    for (layer_name, name), found in expected.items():
        gradient = getattr(model.get_submodule(layer_name), name).grad
        assert (found - gradient).abs().max() < 2e-3 * gradient.abs().max(), (layer_name, name)


@each_family
def test_second_moments_stay_positive_and_training_goes_on(family: str) -> None:
    model = build(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    labels = torch.tensor([0, 1, 2, 0, 1])

    def step() -> None:
        optimizer.zero_grad()
        model(input_values=inputs(), labels=labels).loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    apply(model, [layer.reduce(truncation_of(layer, 5)) for layer in find_layers(model)], optimizer)
    layer = find_layers(model)[0].module
    assert optimizer.state[layer.C]["exp_avg_sq"].shape == layer.C.shape
    assert (optimizer.state[layer.C]["exp_avg_sq"] > 0).all()
    assert optimizer.state[layer.C]["step"] == 3
    poles = layer.nu_log if family == "lru" else layer.A_imag
    assert not optimizer.state[poles]
    step()
    assert optimizer.state[poles]["step"] == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@each_family
@pytest.mark.parametrize("rule", ["largest", "smallest", "random"])
@torch.no_grad()
def test_selection_keeps_states_bit_by_bit(family: str, rule: str) -> None:
    model = build(family, trained=True)
    layer = find_layers(model)[0]
    truncation = truncation_of(layer, 6, "selection", rule)
    before = {name: parameter.detach().clone() for name, parameter in layer.state_parameters().items()}
    reduction = layer.reduce(truncation)
    apply(model, [reduction])
    kept = truncation.indices
    for (name, parameter), change in zip(layer.state_parameters().items(), reduction.parameters):
        if family == "lru":
            expected = before[name][:, kept] if name == "C" else before[name][kept]
        else:
            expected = torch.stack([row[index] for row, index in zip(before[name], kept)])
        assert torch.equal(parameter, expected)
        assert torch.equal(change.moment_map.first(before[name]), expected)
        assert torch.equal(change.moment_map.second(before[name].square()), expected.square())
    scores = ClosedFormGramians(layer.system()).state_scores()
    assert scores.shape[-1] == 6


@torch.no_grad()
def test_one_channel_without_enough_states_does_not_keep_the_others() -> None:
    model = build("s4d", trained=True)
    layer = find_layers(model)[0]
    layer.module.C[1] = 0
    layer.module.C[2, 3:] = 0
    u = torch.randn(2, 50, 6)
    full = layer.system()
    before = layer.module(u)
    truncation = truncation_of(layer, 9)
    assert truncation.active.sum(-1).tolist() == [9, 0, 3, 9, 9, 9]
    apply(model, [layer.reduce(truncation)])
    reduced = layer.system()
    assert reduced.is_stable()
    torch.testing.assert_close(layer.module(u)[..., 1:3], before[..., 1:3], atol=1e-4, rtol=1e-4)
    bound = torch.as_tensor(error_bound(full.hankel_singular_values(), 9))
    error = response_error(full, reduced, verification_frequencies(full, reduced)).amax(-1)
    assert (error <= bound + 2e-3 * full.hankel_singular_values()[:, 0]).all()
    # Inert states can be trained: their readout is zero, their poles and inputs are not.
    with torch.enable_grad():
        layer.module(u).square().sum().backward()
        (layer.module(u)[..., 0] - 1).square().sum().backward()
    assert (layer.module.C == 0).all(-1)[1].all()
    assert layer.module.A_real_log.isfinite().all()


@torch.no_grad()
def test_a_rank_beyond_the_spectrum_fills_up_with_states_that_can_be_trained() -> None:
    model = repeat_states(build("lru"))
    layer = find_layers(model)[0]
    u = torch.randn(2, 50, 6)
    before = layer.module(u)
    truncation = truncation_of(layer, 12)
    assert truncation.active.sum() == 8
    apply(model, [layer.reduce(truncation)])
    torch.testing.assert_close(layer.module(u), before, atol=1e-4, rtol=1e-4)
    with torch.enable_grad():
        layer.module(u).square().sum().backward()
    assert (layer.module.C.grad.abs().sum((0, 2)) > 0).all()


@each_family
def test_sizes_in_the_config_are_a_number_or_a_list(family: str, tmp_path) -> None:
    model = build(family, trained=True)
    layers = find_layers(model)
    record = compress(model, [], CompreSSMConfig(strategy="fixed", keep_ratio=0.5))
    assert record.outcome == "cut", record.reason
    assert model.config.state_size == 8
    assert type(model.config.state_size) is int
    compress(model, [], CompreSSMConfig(tolerance=0.1, uniform=False))
    sizes = [layer.state_size for layer in layers]
    assert model.config.state_size == (sizes if len(set(sizes)) > 1 else sizes[0])


RELOAD = """
import sys, torch, hf_compressm.models
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    saved = torch.load(folder + "/expected.pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(input_values=saved["inputs"]).logits, saved["logits"])
    print(model.config.model_type, model.config.state_size)
"""


@torch.no_grad()
def test_compressed_models_reload_in_a_fresh_process(tmp_path) -> None:
    folders = []
    for family in ("lru", "s4d"):
        model, folder = build(family, trained=True), tmp_path / family
        layers = find_layers(model)
        apply(model, [layer.reduce(truncation_of(layer, rank)) for layer, rank in zip(layers, (7, 4))])
        for change in type(layers[0]).config_changes(layers, [7, 4]):
            setattr(change.owner, change.name, change.value)
        model.save_pretrained(folder)
        torch.save({"inputs": inputs(), "logits": model(input_values=inputs()).logits}, folder / "expected.pt")
        folders.append(str(folder))
    run = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["lru [7, 4]", "s4d [7, 4]"]


@each_family
def test_sizes_follow_a_state_dict(family: str) -> None:
    small, large = build(family, state_size=5), build(family)
    state_dict = small.state_dict()
    for layer in find_layers(large):
        assert layer.saved_state_size(state_dict, layer.name + ".") == 5
        assert layer.saved_state_size({}, layer.name + ".") is None
        layer.resize(5)
    large.load_state_dict(state_dict)
    torch.testing.assert_close(large(input_values=inputs()).logits, small(input_values=inputs()).logits)


@each_family
def test_what_cannot_be_held_is_refused(family: str) -> None:
    model = build(family)
    layer = find_layers(model)[0]
    with pytest.raises(DimensionError, match="is for 3 states"):
        layer.reduce(Truncation.from_indices([0, 1], full_size=3))
    probe = copy.deepcopy(model)
    find_layers(probe)[0].module.C = nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(UnsupportedModelError, match="needs"):
        find_layers(probe)
    layer.module.C.data.fill_(1e38)
    T = 100 * torch.eye(16, dtype=torch.complex128).expand(*layer.system().batch_shape, 16, 16)[..., :4]
    if family == "lru":
        # With a B of zero the scale between B and C stays as the truncation has it.
        layer.module.B.data.zero_()
        with pytest.raises(TruncationError, match="C is not finite in torch.float32"):
            layer.reduce(Truncation(T=T, W=T / 1e4))


def test_a_batch_of_systems_is_cut_in_one_call(monkeypatch) -> None:
    import hf_compressm.systems.reductors.balanced_each as module

    calls = []
    original = module.balanced_truncation
    monkeypatch.setattr(module, "balanced_truncation", lambda *a: calls.append(a[0].batch_shape) or original(*a))
    layer = find_layers(build("s4d", hidden_size=32))[0]
    truncation_of(layer, 5)
    assert calls == [(32,)]


def test_selection_of_a_system_needs_scores_of_its_shape() -> None:
    system = DiagonalLTI(torch.tensor([[0.5, 0.9]]), torch.ones(1, 2, 1), torch.ones(1, 1, 2))
    scores = ClosedFormGramians(system).state_scores()
    torch.testing.assert_close(scores, system.controllability_gramian().diagonal(dim1=-2, dim2=-1).real)
    assert selection_truncation(scores, 1).indices.tolist() == [[1]]


@pytest.mark.parametrize("build, batch", [(tiny_lru, token_batch), (tiny_s4d, real_valued_batch)])
def test_a_layer_shows_its_input_and_its_output_before_the_skip(build, batch) -> None:
    """Also in a batch with padding, which the recurrence does not see."""
    model, seen, shown = build().eval(), [], []
    layer = find_layers(model)[0]

    class Watcher:
        def observe(self, inputs, output):
            seen.append((inputs.u, output))
            return output

    hook = layer.module.register_forward_hook(lambda module, args, output: shown.append(output))
    logits = logits_of(model, batch())
    hidden = torch.randn(2, 7, 16)
    mask = torch.arange(7).expand(2, 7) > 2
    with layer.observed(Watcher()):
        torch.testing.assert_close(logits_of(model, batch()), logits)
        layer.module(hidden, mask=mask)
    assert len(seen) == 2 and seen[0][0].shape == (4, 20, 16)
    u, output = seen[1]
    assert torch.equal(u, hidden * mask[..., None])
    torch.testing.assert_close(output + u * layer.module.D, shown[-1])
    hook.remove()
    with torch.no_grad():
        layer.module.D.zero_()
    torch.testing.assert_close(layer.module(hidden, mask=mask), output, rtol=1e-5, atol=1e-5)
    logits_of(model, batch())
    assert len(seen) == 2, "nothing is seen after the context"
