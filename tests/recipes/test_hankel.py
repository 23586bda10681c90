"""The Hankel penalty against finite differences and against the published route through the eigenvalues of P Q."""

from __future__ import annotations

import pytest
import torch
from experiments.cost import Stopwatch
from experiments.hankel import HankelPenalty, HankelTrainer, hankel_nuclear_norm
from experiments.layer_systems import layer_systems
from experiments.models import build_model

from hf_compressm.systems import DiagonalLTI

SHAPES = {"one system": ((6,), 2, 3), "a batch": ((4, 5), 1, 1)}


def parts(shape, inputs, outputs, seed=0) -> tuple[torch.Tensor, ...]:
    """Real tensors that stand for the poles' logarithmic radius and angle, B and C."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()

    batch, order = shape[:-1], shape[-1]
    return (
        normal(*shape),
        normal(*shape),
        normal(*batch, order, inputs, 2),
        normal(*batch, outputs, order, 2),
    )


def system_of(nu, theta, B, C) -> DiagonalLTI:
    lam = torch.polar(torch.exp(-torch.exp(nu) / 4), theta)
    return DiagonalLTI(lam, torch.view_as_complex(B), torch.view_as_complex(C))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_the_value_is_the_sum_of_the_hankel_singular_values(case) -> None:
    system = system_of(*parts(*case))
    torch.testing.assert_close(hankel_nuclear_norm(system), system.hankel_singular_values().sum(-1))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_the_gradient_is_that_of_finite_differences(case) -> None:
    tensors = parts(*case)

    def value(*tensors):
        return system_of(*tensors).hankel_singular_values().sum()

    gradients = torch.autograd.grad(hankel_nuclear_norm(system_of(*tensors)).sum(), tensors)
    step = 1e-6
    for number, (tensor, gradient) in enumerate(zip(tensors, gradients)):
        for index in range(0, tensor.numel(), max(1, tensor.numel() // 5)):
            sides = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in tensors]
                moved[number].view(-1)[index] += sign * step
                sides.append(float(value(*moved)))
            expected = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.reshape(-1)[index]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_gradient_is_that_of_the_eigenvalues_of_the_product() -> None:
    tensors = parts((5,), 2, 2, seed=3)
    system = system_of(*tensors)
    product = system.controllability_gramian() @ system.observability_gramian()
    published = torch.linalg.eigvals(product).sqrt().real.sum()
    expected = torch.autograd.grad(published, tensors)
    found = torch.autograd.grad(hankel_nuclear_norm(system_of(*tensors)), tensors)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_states_that_are_not_seen_do_not_make_the_gradient_infinite() -> None:
    nu, theta, B, C = parts((5,), 1, 1)
    with torch.no_grad():
        B[2:] = 0
    gradients = torch.autograd.grad(hankel_nuclear_norm(system_of(nu, theta, B, C)), (nu, theta, B, C))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("family", ["lru", "s4d"])
def test_a_models_layers_are_found_and_get_gradients(family, tiny, digits) -> None:
    settings = tiny().model
    model = build_model({**settings, "name": family, "num_hidden_layers": 2}, digits, 8)
    systems = layer_systems(model)
    assert len(systems) == 2
    penalty = HankelPenalty(weight=0.5)(model)
    sums = [system.hankel_singular_values().sum(-1).mean() for system in systems.values()]
    torch.testing.assert_close(penalty, 0.5 * sum(sums))
    penalty.backward()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == (
        {"nu_log", "theta_log", "gamma_log", "B", "C"} if family == "lru" else {"log_dt", "A_real_log", "A_imag", "C"}
    )


def test_a_model_without_time_invariant_layers_is_refused(tiny, digits) -> None:
    model = build_model({**tiny().model, "name": "mamba"}, digits, 4)
    with pytest.raises(ValueError, match="use the model lru or s4d"):
        HankelPenalty()(model)


def test_the_trainer_adds_the_gradients_of_the_penalty(tiny, digits, tmp_path) -> None:
    from transformers import TrainingArguments

    settings = tiny(**{"model.dropout": 0.0})
    model = build_model(settings.model, digits, 8).train()
    batch = digits.collator([digits.train[index] for index in range(8)])
    stopwatch = Stopwatch()
    trainer = HankelTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), report_to="none"),
        penalty=HankelPenalty(0.3),
        stopwatch=stopwatch,
    )
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = model(**batch).loss + HankelPenalty(0.3)(model)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert stopwatch.cost.seconds > 0
    model.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(float(model(**batch).loss))


def test_a_weight_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="weight is 0"):
        HankelPenalty(0)
