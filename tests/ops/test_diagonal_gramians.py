"""Gramians of time-invariant layers from data: against plain loops, autograd and the closed form under white noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import (
    _diagonal_pieces,
    channel_systems_reference,
    diagonal_adjoint_gramian,
    diagonal_recurrence_reference,
    diagonal_scan_reference,
    diagonal_state_gramian,
    sample_times,
)
from hf_compressm.systems import controllability_gramian


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def poles(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    radius = 0.5 + 0.49 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return torch.polar(radius, 6 * torch.rand(*shape, generator=generator, dtype=torch.float64))


def loop(u: Tensor, lam: Tensor, B: Tensor, times: Tensor, mask: Tensor) -> Tensor:
    """What the Gramian is, state by state."""
    total = torch.zeros(lam.shape[-1], lam.shape[-1], dtype=torch.complex128)
    for row in range(u.shape[0]):
        state = torch.zeros_like(lam)
        for step in range(u.shape[1]):
            state = lam * state + B @ u[row, step].to(torch.complex128)
            total += (times[row] == step).sum() * mask[row, step] * torch.outer(state, state.conj())
    return total * u.shape[1] / times.shape[1]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
@pytest.mark.parametrize("count", [3, 20])
def test_the_sum_over_states_is_that_of_a_loop(piece: int, count: int, monkeypatch) -> None:
    monkeypatch.setattr(_diagonal_pieces, "_PIECE_STATES", piece * 2 * 5)
    u, lam, B = normal(2, 20, 3, dtype=torch.float64), poles(5), normal(5, 3)
    times = sample_times(2, 20, count, torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    found = diagonal_state_gramian(u, lam, B, times, mask)
    torch.testing.assert_close(found, loop(u, lam, B, times, mask), rtol=1e-12, atol=1e-12)


def test_one_system_a_channel_is_that_many_systems() -> None:
    u, lam, B = normal(2, 20, 4, dtype=torch.float64), poles(4, 3), normal(4, 3)
    found = diagonal_state_gramian(u, lam, B)
    for channel in range(4):
        alone = diagonal_state_gramian(u[..., channel : channel + 1], lam[channel], B[channel].unsqueeze(-1))
        torch.testing.assert_close(found[channel], alone, rtol=1e-12, atol=1e-12)


def test_white_noise_gives_the_closed_form() -> None:
    lam, B = poles(6), normal(6, 2)
    measured = diagonal_state_gramian(normal(64, 4000, 2, dtype=torch.float64), lam, B) / (64 * 4000)
    exact = controllability_gramian(lam, B)
    assert torch.linalg.matrix_norm(measured - exact) < 0.03 * torch.linalg.matrix_norm(exact)


def states_with_gradient(u: Tensor, lam: Tensor, B: Tensor, C: Tensor, grad_y: Tensor) -> Tensor:
    """The gradient of sum(y * grad_y) with respect to every state, by autograd through a loop."""
    states, taps = [], []
    state = torch.zeros(u.shape[0], lam.shape[0], dtype=torch.complex128)
    for step in range(u.shape[1]):
        tap = torch.zeros_like(state, requires_grad=True)
        state = lam * state + u[:, step].to(torch.complex128) @ B.mT + tap
        states.append(state)
        taps.append(tap)
    y = torch.stack([(state @ C.mT).real for state in states], dim=1)
    return torch.stack(torch.autograd.grad((y * grad_y).sum(), taps), dim=1)


@pytest.mark.parametrize("masked", [False, True])
def test_adjoint_states_are_the_gradients_that_autograd_gives(masked: bool) -> None:
    u, lam, B, C = normal(2, 12, 3, dtype=torch.float64), poles(5), normal(5, 3), normal(2, 5, seed=3)
    grad_y = normal(2, 12, 2, seed=4, dtype=torch.float64)
    mask = torch.arange(12) < torch.tensor([[12], [7]]) if masked else torch.ones(2, 12, dtype=torch.bool)
    gradients = states_with_gradient(u, lam, B, C, grad_y) * mask.unsqueeze(-1)
    expected = torch.einsum("bti,btj->ij", gradients, gradients.conj())
    found = diagonal_adjoint_gramian(lam, C, grad_y, mask=mask if masked else None)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_adjoint_states_of_channels_are_those_of_each_channel() -> None:
    lam, C, grad_y = poles(4, 3), normal(4, 3), normal(2, 15, 4, dtype=torch.float64)
    times = sample_times(2, 15, 5, torch.Generator().manual_seed(2))
    found = diagonal_adjoint_gramian(lam, C, grad_y, times)
    for channel in range(4):
        alone = diagonal_adjoint_gramian(lam[channel], C[channel][None], grad_y[..., channel : channel + 1], times)
        torch.testing.assert_close(found[channel], alone, rtol=1e-12, atol=1e-12)


def test_the_conventions_are_those_of_the_recurrences() -> None:
    """A change of the readout along an eigenvector without energy in P changes no output."""
    u, lam, B = normal(3, 30, 1, dtype=torch.float64), poles(4), normal(4, 1)
    states = diagonal_scan_reference(lam, u.to(torch.complex128) @ B.mT)
    P = diagonal_state_gramian(u, lam, B)
    C = normal(1, 4, seed=5)
    energy = (C @ P @ C.mH).real
    torch.testing.assert_close((states @ C.mT).abs().square().sum(), energy.squeeze(), rtol=1e-10, atol=0)
    y, _ = diagonal_recurrence_reference(u, lam, B, C)
    torch.testing.assert_close(y, (states @ C.mT).real)
    one_channel, _ = channel_systems_reference(u, lam[None], (C * B.mT))
    torch.testing.assert_close(one_channel, y)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lam": torch.zeros(3, dtype=torch.complex128)}, DimensionError),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, DimensionError),
        ({"times": torch.tensor([[3, 1], [0, 2]])}, DimensionError),
        ({"u": torch.zeros(2, 8, 3, dtype=torch.int64)}, ConfigurationError),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], error: type[Exception]) -> None:
    arguments = {"u": normal(2, 8, 3, dtype=torch.float64), "lam": poles(4), "B": normal(4, 3)}
    with pytest.raises(error, match=f"`{next(iter(change))}`|`B`|`times`"):
        diagonal_state_gramian(**{**arguments, **change})
