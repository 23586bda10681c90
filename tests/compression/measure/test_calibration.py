"""The calibration pass against a plain loop and against autograd, and what it leaves untouched."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, analyze, fast_cpu_scan
from hf_compressm.architectures import DeltaRuleInputs, SelectiveScanInputs, find_layers
from hf_compressm.architectures.families.gated_delta_net import GatedDeltaNetLayer
from hf_compressm.compression import calibrate, evaluate_loss
from hf_compressm.compression.measure.model_pass import loss_terms
from hf_compressm.compression.measure.observers import LOSS_SCALE, LossGradientObserver
from hf_compressm.errors import CalibrationError
from hf_compressm.ops import selective_scan_reference
from hf_compressm.systems import DiagonalLTI, fit_readout
from tests.cases import (
    SELECTIVE_CASES,
    case_id,
    real_valued_batch,
    real_valued_model,
    tiny_mamba,
    token_batch,
)

GRAMIANS = ["loss_gradient", "white_noise", "averaged"]


class KeepInputs:
    """Records a layer's scans."""

    def __init__(self) -> None:
        self.seen = []

    def observe(self, inputs, output):
        output.retain_grad()
        self.seen.append((inputs, output))
        return output


def loop_gramians(model: nn.Module, batch: dict) -> dict[str, tuple[torch.Tensor, ...]]:
    """Mean Gramians of every layer from plain loops over time, all states kept, in float64."""
    layers, keepers = find_layers(model), {}
    model.eval()
    contexts = []
    for layer in layers:
        keepers[layer.name] = KeepInputs()
        contexts.append(layer.observed(keepers[layer.name]))
    for context in contexts:
        context.__enter__()
    model(**batch, **({"use_cache": False} if hasattr(model, "config") else {}))
    output = model(**batch)
    loss = output.loss if hasattr(output, "loss") else output[0]
    # One scan of each part of the layer; the pass before was made for nothing but to see that it leaves no trace.
    parts = {name: len({inputs.part for inputs, _ in keeper.seen}) for name, keeper in keepers.items()}
    loss.backward()
    for context in contexts:
        context.__exit__(None, None, None)
    model.zero_grad()
    # The adjoint states are those of the sum over all loss terms, of which the loss is the mean.
    terms = batch["labels"].numel()
    results = {}
    for name, keeper in keepers.items():
        found = [_loop(*scan) for scan in keeper.seen[-parts[name] :]]
        P, Q, energy, R = (torch.cat(tensors) for tensors in zip(*found))
        P, Q, energy, R = (P, Q, energy, R) if len(P) > 1 else (P[0], Q[0], energy[0], R[0])
        results[name] = P, Q * terms**2, energy, R
    return results


def _loop(inputs, output):
    """P, Q, readout energies and R of each group, (groups, N, N) and (groups, N), of one scan."""
    if isinstance(inputs, DeltaRuleInputs):
        return _of_groups(*_delta_rule_loop(inputs, output.grad.double()), inputs.B.shape[2])
    u, delta, A, B, C = (getattr(inputs, name).detach().double() for name in ("u", "delta", "A", "B", "C"))
    grad, n_states = output.grad.double(), B.shape[-1]
    # All as the scan of one head a channel, with a group's B and C for each.
    heads = u.shape[2]
    B, C = (M[:, :, None] if M.ndim == 3 else M for M in (B, C))
    groups = B.shape[2]
    B, C = (M.repeat_interleave(heads // groups, dim=2)[..., None, :] for M in (B, C))
    u, grad = (M[..., None] if M.ndim == 3 else M for M in (u, grad))
    A = A[:, None, :] if A.ndim == 2 else A[:, None, None].expand(-1, 1, n_states)
    decay = torch.exp(delta[..., None, None] * A)
    h, states = u.new_zeros(*u[:, 0].shape, n_states), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t]
        states.append(h)
    g, adjoints = torch.zeros_like(h), []
    for t in reversed(range(u.shape[1])):
        g = grad[:, t, ..., None] * C[:, t] + g
        adjoints.append(g)
        g = g * decay[:, t]
    return _of_groups(states, adjoints, C, groups)


def _delta_rule_loop(inputs, grad):
    """States and adjoint states of every step, lists of (batch, heads, head_dim, N), and C for every head."""
    v, g, beta = (tensor.detach().double() for tensor in (inputs.u, inputs.log_decay, inputs.beta))
    k, q = (M.detach().double().repeat_interleave(v.shape[2] // M.shape[2], dim=2) for M in (inputs.B, inputs.C))
    identity = torch.eye(k.shape[-1], dtype=torch.float64)
    moves = g.exp()[..., None, None] * (identity - beta[..., None, None] * k[..., :, None] * k[..., None, :])
    h, states = v.new_zeros(*v[:, 0].shape, k.shape[-1]), []
    for t in range(v.shape[1]):
        h = h @ moves[:, t].mT + (beta[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None]
        states.append(h)
    adjoint, adjoints = torch.zeros_like(h), []
    for t in reversed(range(v.shape[1])):
        adjoint = grad[:, t, ..., None] * q[:, t, :, None] + adjoint
        adjoints.append(adjoint)
        adjoint = adjoint @ moves[:, t]
    return states, adjoints, q[..., None, :]


def _of_groups(states, adjoints, C, groups):
    def of_groups(rows):
        return [part.reshape(-1, C.shape[-1]) for part in torch.stack(rows, 1).chunk(groups, dim=2)]

    H, G, read = of_groups(states), of_groups(adjoints), of_groups([h * C[:, t] for t, h in enumerate(states)])
    readouts = of_groups(list(C.expand_as(torch.stack(states, 1)).unbind(1)))
    P, Q, R = (torch.stack([M.T @ M / len(M) for M in rows]) for rows in (H, G, readouts))
    return P, Q, torch.stack([rows.square().mean(0) for rows in read]), R


@pytest.mark.parametrize("case", SELECTIVE_CASES, ids=case_id)
@pytest.mark.parametrize("fast", [True, False])
def test_loss_gradient_gramians_equal_those_of_a_loop(case, fast: bool, monkeypatch) -> None:
    def every_step(inputs: DeltaRuleInputs, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(inputs.u.shape[1]).repeat(inputs.u.shape[0], 1)

    monkeypatch.setattr(DeltaRuleInputs, "sample_times", every_step)
    model, batch = case.build(), case.batch()
    if case.is_pretrained_model:
        model.config.use_cache = False
    expected = loop_gramians(model, batch)
    with fast_cpu_scan(fast):
        found = calibrate(model, find_layers(model), [batch]).gramians
    for name, (P, Q, energy, R) in expected.items():
        # N = 8 is small enough that every step is sampled (of a delta rule because it was told to).
        torch.testing.assert_close(found[name].P, P, rtol=1e-4, atol=1e-6 * float(P.max()))
        torch.testing.assert_close(found[name].Q, Q, rtol=1e-3, atol=1e-5 * float(Q.max()))
        torch.testing.assert_close(found[name].readout_energy, energy, rtol=1e-4, atol=1e-6 * float(energy.max()))
        torch.testing.assert_close(found[name].R, R, rtol=1e-5, atol=1e-6 * float(R.max()))


@pytest.mark.parametrize("gramians", GRAMIANS)
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_leaves_no_trace(gramians: str, training: bool) -> None:
    model, batch = tiny_mamba(), token_batch()
    model.train(training)
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    scan = vars(__import__("transformers.models.mamba.modeling_mamba", fromlist=["x"]))["mamba_selective_scan"]
    calibrate(model, find_layers(model), [batch], gramians=gramians)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.config.use_cache is True
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert vars(__import__("transformers.models.mamba.modeling_mamba", fromlist=["x"]))["mamba_selective_scan"] is scan


def test_existing_gradients_are_not_touched() -> None:
    model, batch = tiny_mamba(), token_batch()
    model(**batch).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    calibrate(model, find_layers(model), [batch])
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in model.named_parameters())


def test_frozen_weights_do_not_hide_the_gradient() -> None:
    model, batch = tiny_mamba(), token_batch()
    expected = calibrate(model, find_layers(model), [batch]).gramians
    model.requires_grad_(False)
    found = calibrate(model, find_layers(model), [batch]).gramians
    for name in expected:
        torch.testing.assert_close(found[name].Q, expected[name].Q)


def test_batches_and_processes_add_up() -> None:
    """Two batches, or two processes with one batch each, see what one pass over both sees."""
    model, batches = tiny_mamba(), [token_batch(seed=1), token_batch(seed=2)]
    layers = find_layers(model)
    both = calibrate(model, layers, batches)
    parts = []
    for batch in batches:
        sent = []
        calibrate(model, layers, [batch], sum_over_processes=lambda t, sent=sent: sent.append(t.clone()) or t)
        parts.append(sent)
    assert all(t.dtype == torch.float64 for sent in parts for t in sent)
    totals = [a + b for a, b in zip(*parts)]
    replies = iter(totals)
    joined = calibrate(model, layers, batches[:1], sum_over_processes=lambda t: next(replies))
    for name in both.gramians:
        torch.testing.assert_close(joined.gramians[name].P, both.gramians[name].P)
        torch.testing.assert_close(joined.gramians[name].Q, both.gramians[name].Q)
    assert math.isclose(joined.loss, both.loss, rel_tol=1e-6)


def test_the_averaged_form_is_that_of_the_averaged_system() -> None:
    """With inputs that do not vary the averaged Gramians are those of each channel's own system."""
    model, batch = tiny_mamba(), token_batch()
    layer = find_layers(model)[0]
    found = calibrate(model, [layer], [batch], gramians="averaged").gramians[layer.name]
    keeper = KeepInputs()
    with layer.observed(keeper):
        model.eval()(batch["input_ids"], use_cache=False)
    inputs = keeper.seen[0][0]
    delta = inputs.delta.double().mean((0, 1))
    P = torch.zeros(8, 8, dtype=torch.float64)
    for channel in range(32):
        lam = torch.exp(delta[channel] * inputs.A[channel].double()).to(torch.complex128)
        b = (delta[channel] * inputs.B.double().mean((0, 1)))[:, None]
        c = inputs.C.double().mean((0, 1))[None]
        P += DiagonalLTI(lam=lam, B=b, C=c).controllability_gramian().real
    torch.testing.assert_close(found.P, P)


def test_white_noise_needs_no_labels() -> None:
    model, batch = tiny_mamba(), token_batch()
    spectrum = analyze(model, [{"input_ids": batch["input_ids"]}], CompreSSMConfig(gramians="white_noise"))
    assert spectrum.loss is None and all((sigma > 0).all() for sigma in spectrum.sigma.values())


def test_a_batch_without_labels_is_refused_with_the_remedy() -> None:
    model = tiny_mamba()
    with pytest.raises(CalibrationError, match="no scalar loss.*input_ids.*labels.*loss_function.*white_noise"):
        calibrate(model, find_layers(model), [{"input_ids": token_batch()["input_ids"]}])


@pytest.mark.parametrize("parts", [(31, 1), (10, 10, 12)])
def test_examples_weigh_alike_however_they_are_batched(parts: tuple[int, ...]) -> None:
    """A last batch of one example has a mean loss with 31 times the gradient of each; it must not rule the Gramian."""
    model, batch = real_valued_model(), real_valued_batch(batch=32)
    layers = find_layers(model)
    pieces = [dict(zip(batch, rows)) for rows in zip(*(values.split(parts) for values in batch.values()))]
    whole, split = calibrate(model, layers, [batch]), calibrate(model, layers, pieces)
    assert math.isclose(whole.loss, split.loss, rel_tol=1e-5)
    for name, expected in whole.gramians.items():
        for matrix in ("P", "Q", "readout_energy", "R"):
            found, wanted = getattr(split.gramians[name], matrix), getattr(expected, matrix)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
    assert math.isclose(evaluate_loss(model, pieces), whole.loss, rel_tol=1e-5)


def test_labels_that_are_ignored_do_not_count() -> None:
    labels = torch.tensor([[1, -100, -100], [2, 3, -100]])
    assert loss_terms({"input_ids": labels, "labels": labels}) == 3
    assert loss_terms({"x": [torch.zeros(5, 2)], "labels": torch.zeros(5)}) == 5
    assert loss_terms(torch.zeros(7, 3)) == 7 and loss_terms({"labels": torch.full((2,), -100)}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_half_precision(dtype: torch.dtype) -> None:
    """A loss whose gradient at the scan is near float16's smallest number gives the same directions as float32."""
    model, batch = tiny_mamba(), token_batch()

    def faint(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            return model(**batch).loss * 1e-5

    layers = find_layers(model)
    exact, half = calibrate(model, layers, [batch]), calibrate(model, layers, [batch], loss_function=faint)
    for name in exact.gramians:
        a, b = (result.gramians[name].Q.flatten() for result in (exact, half))
        assert float(torch.dot(a, b) / (a.norm() * b.norm())) > 0.999


def test_a_loss_function_of_the_user_is_used() -> None:
    model, batch = tiny_mamba(), token_batch()
    labels = batch.pop("labels")

    def loss(model, batch):
        return 3 * model(**batch, labels=labels).loss

    plain = calibrate(model, find_layers(model), [{**batch, "labels": labels}])
    scaled = calibrate(model, find_layers(model), [batch], loss_function=loss)
    assert math.isclose(scaled.loss, 3 * plain.loss, rel_tol=1e-6)
    for name in plain.gramians:
        # Without labels in the batch its 4 examples count, with them 4 x 20 labels.
        torch.testing.assert_close(scaled.gramians[name].Q, 9 / 20**2 * plain.gramians[name].Q)
    assert math.isclose(evaluate_loss(model, [batch], loss), scaled.loss, rel_tol=1e-6)


@pytest.mark.parametrize("gramians", GRAMIANS)
def test_a_loss_that_is_not_finite_is_refused(gramians: str) -> None:
    model = tiny_mamba()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="calibration loss is nan"):
        calibrate(model, find_layers(model), [token_batch()], gramians=gramians)


def test_no_batch_is_refused() -> None:
    model = tiny_mamba()
    with pytest.raises(CalibrationError, match="no calibration batch"):
        calibrate(model, find_layers(model), [])


@pytest.mark.parametrize("gramians", GRAMIANS)
def test_a_layer_that_is_never_run_is_named(gramians: str) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = tiny_mamba(), tiny_mamba()

        def forward(self, **batch):
            return self.used(**batch)

    model = Idle()
    found = calibrate(model, find_layers(model), [token_batch()], gramians=gramians)
    assert set(found.gramians) == {f"used.backbone.layers.{number}.mixer" for number in range(2)}
    assert found.unreached["idle.backbone.layers.0.mixer"] == "was not run by the calibration batches"


def test_equal_seeds_give_equal_gramians() -> None:
    model, batch = tiny_mamba(state_size=40), token_batch(length=60)
    layers = find_layers(model)
    first, again, other = (calibrate(model, layers, [batch], seed=seed).gramians for seed in (1, 1, 2))
    name = layers[0].name
    assert torch.equal(first[name].P, again[name].P) and torch.equal(first[name].Q, again[name].Q)
    assert not torch.equal(first[name].P, other[name].P), "only sampled steps enter, so the seed matters"


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_that_the_loss_itself_takes_are_no_adjoint_states(create_graph: bool) -> None:
    """As in a gradient penalty: the adjoint states are those of the whole loss, and each counts once."""

    def penalised(model, batch):
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=batch["labels"], use_cache=False).loss
        (slope,) = torch.autograd.grad(4096 * loss, embeds, create_graph=create_graph, retain_graph=True)
        return loss + 0 * slope.square().sum()

    model, batch = tiny_mamba(), token_batch()
    layers = find_layers(model)
    expected = calibrate(model, layers, [batch]).gramians
    found = calibrate(model, layers, [batch], loss_function=penalised).gramians
    for layer in layers:
        torch.testing.assert_close(found[layer.name].Q, expected[layer.name].Q, rtol=1e-5, atol=1e-12)


def output_error(truncation, samples) -> float:
    """What a truncation does to the sampled outputs, weighted."""
    # A group's matrix for each of its steps.
    T, W = (M.float().unsqueeze(-3) for M in (truncation.T, truncation.W))
    read = samples.readout.unsqueeze(-2)
    left = (read * samples.states).sum(-1) - ((read @ T) * (samples.states @ W)).sum(-1)
    return float((samples.weights * left.square()).sum())


@pytest.mark.parametrize("case", SELECTIVE_CASES, ids=case_id)
@pytest.mark.parametrize("gramians", ["loss_gradient", "white_noise"])
def test_a_readout_is_fitted_to_the_outputs(case, gramians: str) -> None:
    model = case.build()
    layers = find_layers(model)
    batches = [case.batch(batch=8, seed=seed) for seed in range(2)]
    without = calibrate(model, layers, batches, gramians=gramians).gramians
    found = calibrate(model, layers, batches, gramians=gramians, fit_readout=True).gramians
    config = CompreSSMConfig()
    for layer in layers:
        known, size = found[layer.name], layer.state_size // 2
        assert without[layer.name].samples is None
        rebuilding, reductor = replace(known, samples=None), layer.default_reductor(stock=False)
        fitted, rebuilt = (each.truncate(size, reductor, config) for each in (known, rebuilding))
        if known.samples is None:
            assert isinstance(layer, GatedDeltaNetLayer)
            continue
        assert torch.equal(fitted.W, rebuilt.W)
        # Where held-out steps gain nothing by a fit, the truncation stays as it is.
        assert output_error(fitted, known.samples) <= output_error(rebuilt, known.samples) * (1 + 1e-5)
        chosen = known.truncate(size, "selection", config)
        assert torch.equal(chosen.T, rebuilding.truncate(size, "selection", config).T)


def test_a_fit_pays_where_readout_and_state_depend_on_each_other() -> None:
    """In half of the sequences a state is the other one's copy, and only there it is read."""
    generator = torch.Generator().manual_seed(0)
    u, B = torch.randn(64, 30, 1, generator=generator), torch.randn(64, 30, 2, generator=generator)
    C = torch.ones(64, 30, 2)
    B[..., 0] = 1
    B[:32, :, 1], C[32:, :, 1] = 1, 0
    delta, A = torch.full_like(u, 0.5), -torch.ones(1, 2)
    trigger = torch.zeros((), requires_grad=True)
    observer = LossGradientObserver(torch.Generator().manual_seed(0), trigger, samples_outputs=True)
    output = observer.observe(
        SelectiveScanInputs(u, delta, A, B, C), selective_scan_reference(u, delta, A, B, C)[0].requires_grad_()
    )
    observer.loss_terms = 1
    torch.autograd.grad(LOSS_SCALE * output.sum(), trigger)
    known = observer.result("layer", lambda tensor: tensor)
    rebuilt = known.truncate(1, "interpolative", CompreSSMConfig())
    assert known.samples_for("selection") is None
    fitted = fit_readout(rebuilt, known.samples_for("interpolative"))
    assert fitted.indices.tolist() == [0]
    assert output_error(fitted, known.samples) < 1e-3 * output_error(rebuilt, known.samples)
