"""Empirical Gramians against a plain loop over time, and their adjoint states against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import (
    adjoint_gramian,
    default_sample_count,
    sample_times,
    selective_gramians,
    state_gramian,
)

from .conftest import state_kernels

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 64, 64, 16), (3, 130, 70, 5), (1, 129, 200, 9)]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}


@pytest.fixture(params=state_kernels(), ids=lambda module: module.__name__[25:], autouse=True)
def implementation(request, monkeypatch):
    """Run every test with each of the kernels and with what other devices use."""
    monkeypatch.setattr(
        selective_gramians,
        "_outer_products",
        lambda *args, **options: request.param.sampled_outer_products(*args, **options),
    )
    return request.param


def states_and_adjoints(arguments: dict[str, Tensor], grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """All states (batch, length, channels, N), and by autograd the gradient of `sum(y * grad_y)` in each of them."""
    u, delta, A, B, C, state = (tensor.double() for tensor in arguments.values())
    states, outputs = [], []
    state = state.requires_grad_()
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        states.append(state)
        outputs.append((state * C[:, t, None]).sum(-1))
    adjoints = torch.autograd.grad((torch.stack(outputs, 1) * grad_y.double()).sum(), states)
    return torch.stack(states, 1).detach(), torch.stack(adjoints, 1)


def outer_products(vectors: Tensor, times: Tensor) -> Tensor:
    """Scaled sum over sampled steps, straight from the definition."""
    sampled = torch.cat([sequence[steps].flatten(0, 1) for sequence, steps in zip(vectors, times)])
    return vectors.shape[1] / times.shape[1] * sampled.T @ sampled


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == torch.float64
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sampled", [False, True], ids=["all-steps", "sampled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gramians_match_loop_and_autograd(scan_arguments, shape, sampled, dtype) -> None:
    batch, length, channels, _ = shape
    arguments = scan_arguments(*shape, dtype=dtype)
    grad_y = torch.randn(batch, length, channels).to(dtype)
    states, adjoints = states_and_adjoints(arguments, grad_y)
    # Fewer windows than steps and no divisor of them, so that some step is drawn twice in some sequence.
    times = sample_times(batch, length, max(1, 3 * length // 4), torch.Generator().manual_seed(3)) if sampled else None
    steps = torch.arange(length).expand(batch, length) if times is None else times

    P, readout_energy = state_gramian(**arguments, times=times)
    Q = adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], grad_y, times)
    assert_close(P, outer_products(states, steps), TOLERANCES[dtype])
    assert_close(Q, outer_products(adjoints, steps), TOLERANCES[dtype])
    read = outer_products(states * arguments["C"].double()[:, :, None], steps)
    assert_close(readout_energy, read.diagonal(), TOLERANCES[dtype])


def test_the_size_of_groups_changes_nothing(scan_arguments, monkeypatch, implementation) -> None:
    arguments = scan_arguments(3, 150, 130, 6)
    times = sample_times(3, 150, 40, torch.Generator().manual_seed(3))
    grad_y = torch.randn(3, 150, 130)

    def gramians() -> list[Tensor]:
        Q = adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], grad_y, times)
        return [*state_gramian(**arguments, times=times), Q]

    expected = gramians()
    # Some channels of one sequence, some sequences, one channel.
    for elements in (64 * 6 * 50, 64 * 6 * 300, 0):
        for name in ("_CHUNK_ELEMENTS", "_BUFFER_ELEMENTS"):
            monkeypatch.setattr(implementation, name, elements, raising=False)
        for actual, wanted in zip(gramians(), expected):
            assert_close(actual, wanted, 1e-12)


def test_initial_state_defaults_to_zero_and_gradients_to_none(scan_arguments) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in scan_arguments(2, 6, 5, 3).items()}
    zero = torch.zeros_like(arguments.pop("initial_state"))
    for with_default, with_zero in zip(state_gramian(**arguments), state_gramian(**arguments, initial_state=zero)):
        assert torch.equal(with_default, with_zero)
        assert not with_default.requires_grad


def test_strided_arguments(scan_arguments) -> None:
    arguments = scan_arguments(2, 70, 66, 5)
    strided = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in arguments.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for actual, expected in zip(state_gramian(**strided), state_gramian(**arguments)):
        assert_close(actual, expected, 1e-12)


def test_products_are_taken_in_double_precision(scan_arguments) -> None:
    # With time steps of zero every state is the initial one, exactly, so the only rounding is that of the sums.
    arguments = scan_arguments(3, 20, 70, 5)
    arguments["delta"].zero_()
    states = arguments["initial_state"].double().flatten(0, 1)
    P, readout_energy = state_gramian(**arguments)
    assert_close(P, 20 * states.T @ states, 1e-14)
    read = torch.einsum("bdn,bln->bldn", arguments["initial_state"].double(), arguments["C"].double())
    assert_close(readout_energy, read.square().sum((0, 1, 2)), 1e-14)


def test_large_and_small_states_neither_overflow_nor_vanish(scan_arguments) -> None:
    arguments = scan_arguments(2, 70, 3, 4)
    P, energy = state_gramian(**arguments)
    for scale in (2.0**80, 2.0**-80):
        scaled = arguments | {name: arguments[name] * scale for name in ("u", "initial_state")}
        scaled_P, scaled_energy = state_gramian(**scaled)
        torch.testing.assert_close(scaled_P / scale**2, P, rtol=1e-12, atol=0)
        torch.testing.assert_close(scaled_energy / scale**2, energy, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("two_threads")
def test_results_repeat_exactly(scan_arguments) -> None:
    arguments = scan_arguments(3, 100, 130, 8)
    first, second = state_gramian(**arguments), state_gramian(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_sampled_gramians_are_unbiased(scan_arguments) -> None:
    # Period 8 in the input, as in images read row by row, and 13 samples of 96 steps, which divide neither.
    arguments = scan_arguments(2, 96, 8, 3)
    arguments["u"] = arguments["u"][:, :8].repeat(1, 12, 1)
    arguments["initial_state"].zero_()
    full, _ = state_gramian(**arguments)
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([state_gramian(**arguments, times=sample_times(2, 96, 13, generator))[0] for _ in range(300)])
    standard_error = draws.std(0) / 300**0.5
    assert (standard_error < 0.03 * full.diagonal().max()).all()
    assert ((draws.mean(0) - full).abs() < 4 * standard_error).all()


# ---- sampled times


@pytest.mark.parametrize(("length", "count"), [(64, 8), (100, 7), (10, 9), (5, 1)])
def test_sample_times_are_ascending_one_a_window_and_equally_likely(length, count) -> None:
    batch = 20_000
    times = sample_times(batch, length, count, torch.Generator().manual_seed(0))
    assert times.dtype == torch.int64 and times.shape == (batch, count)
    assert (times.diff(dim=1) >= 0).all() and times.min() == 0 and times.max() == length - 1
    windows = torch.arange(count) * length / count
    assert ((times >= windows.floor()) & (times < (windows + length / count).ceil())).all()
    frequency = times.flatten().bincount(minlength=length) / batch
    assert ((frequency - count / length).abs() < 5 * (count / length / batch) ** 0.5).all()


def test_sample_times_of_all_steps_repeat_with_the_generator() -> None:
    assert torch.equal(sample_times(2, 5, 5), torch.arange(5).expand(2, 5))
    first, second = (sample_times(3, 50, 7, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("count", [0, 6])
def test_sample_times_refuses_a_count_outside_the_sequence(count) -> None:
    with pytest.raises(DimensionError, match=f"`count` is {count}; it must be from 1 to the sequence length, 5"):
        sample_times(2, 5, count)


def test_default_sample_count() -> None:
    assert default_sample_count(64, 8) == 64
    assert default_sample_count(64, 64) == 8
    assert default_sample_count(196, 128) == 13
    assert default_sample_count(3, 256) == 1
    assert default_sample_count(10, 1) == 10


# ---- errors


@pytest.mark.parametrize(
    "times",
    [
        torch.tensor([[0, 1]]),
        torch.tensor([0, 1]),
        torch.tensor([[0, 5], [0, 1]]),
        torch.tensor([[-1, 2], [0, 1]]),
        torch.tensor([[2, 1], [0, 1]]),
        torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
    ],
)
def test_times_that_do_not_fit_are_refused(scan_arguments, times) -> None:
    arguments = scan_arguments(2, 5, 3, 4)
    with pytest.raises(DimensionError, match="`times`"):
        state_gramian(**arguments, times=times)
    with pytest.raises(DimensionError, match="`times`"):
        adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], arguments["u"], times)


def test_shapes_and_devices_that_do_not_fit_are_named(scan_arguments) -> None:
    arguments = scan_arguments(2, 5, 3, 4)
    with pytest.raises(DimensionError, match=r"`B` has shape \(2, 5, 3\); expected \(batch 2, length 5, N 4\)"):
        state_gramian(**{**arguments, "B": arguments["B"][..., :3]})
    with pytest.raises(DimensionError, match=r"`grad_y` has shape \(2, 4, 3\)"):
        adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], arguments["u"][:, :4])
    with pytest.raises(ConfigurationError, match="`C` is on meta"):
        adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"].to("meta"), arguments["u"])


def test_empty_batch_has_zero_gramians(scan_arguments) -> None:
    arguments = scan_arguments(0, 5, 3, 4)
    P, readout_energy = state_gramian(**arguments)
    assert torch.equal(P, torch.zeros(4, 4, dtype=torch.float64)) and not readout_energy.any()
