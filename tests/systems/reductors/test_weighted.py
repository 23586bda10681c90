"""Balanced truncation with measured Gramians: stable for any P, right where the inputs are not white."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compressm.errors import DimensionError, TruncationError, UnstableSystemError
from hf_compressm.ops import diagonal_state_gramian
from hf_compressm.systems import (
    DiagonalLTI,
    balanced_truncation,
    interpolative_truncation,
    project,
    weighted_hankel_decomposition,
    weighted_truncation,
)


def system_of(order: int, inputs: int = 2, outputs: int = 2, seed: int = 0, batch: tuple[int, ...] = ()) -> DiagonalLTI:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*batch, *shape, generator=generator, dtype=torch.complex128)  # noqa: E731
    radius = 0.3 + 0.69 * torch.rand(*batch, order, generator=generator, dtype=torch.float64)
    angle = 6.28 * torch.rand(*batch, order, generator=generator, dtype=torch.float64)
    return DiagonalLTI(torch.polar(radius, angle), draw(order, inputs), draw(outputs, order))


def low_pass_states(system: DiagonalLTI, pole: float) -> Tensor:
    """The state covariance under noise that a first-order filter has smoothed, by scipy on the system behind it."""
    n, inputs = system.B.shape
    A = scipy.linalg.block_diag(np.diag(system.lam.numpy()), pole * np.eye(inputs))
    A[:n, n:] = system.B.numpy() * pole
    B = np.vstack([system.B.numpy(), np.eye(inputs)])
    return torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)[:n, :n])


def smooth_input(batch: int, length: int, channels: int, pole: float, seed: int) -> Tensor:
    noise = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, values = torch.zeros(batch, channels, dtype=torch.float64), []
    for step in noise.unbind(1):
        value = pole * value + step
        values.append(value)
    return torch.stack(values, dim=1)


def output_error(system: DiagonalLTI, reduced: DiagonalLTI, u: Tensor) -> float:
    """The relative error of the real output on an input, by simulation."""

    def simulate(s: DiagonalLTI) -> Tensor:
        state, outputs = torch.zeros(u.shape[0], s.order, dtype=torch.complex128), []
        for step in u.to(torch.complex128).unbind(1):
            state = s.lam * state + step @ s.B.mT
            outputs.append((state @ s.C.mT).real)
        return torch.stack(outputs, dim=1)

    y = simulate(system)
    return float((y - simulate(reduced)).norm() / y.norm())


def test_under_white_noise_it_is_balanced_truncation() -> None:
    system = system_of(12)
    truncation = weighted_truncation(system, 5, system.controllability_gramian())
    reduced, _ = balanced_truncation(system, 5)
    found = project(system, truncation)
    order = [int((found.lam - pole).abs().argmin()) for pole in reduced.lam]
    torch.testing.assert_close(found.lam[order], reduced.lam, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.impulse_response(50), reduced.impulse_response(50), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("pole", [0.0, 0.9])
def test_a_measured_gramian_is_that_of_the_filter_and_the_system_in_series(pole: float) -> None:
    system = system_of(6)
    u = smooth_input(48, 6000, 2, pole, seed=1)
    measured = diagonal_state_gramian(u, system.lam, system.B) / (48 * 6000)
    exact = low_pass_states(system, pole)
    assert torch.linalg.matrix_norm(measured - exact) < 0.05 * torch.linalg.matrix_norm(exact)


@pytest.mark.parametrize("seed", range(5))
def test_on_smooth_inputs_it_loses_less_than_the_closed_form(seed: int) -> None:
    system = system_of(24, seed=seed)
    u = smooth_input(8, 400, 2, 0.97, seed=seed)
    weighted = project(system, weighted_truncation(system, 6, low_pass_states(system, 0.97)))
    fresh = smooth_input(8, 400, 2, 0.97, seed=seed + 100)
    assert output_error(system, weighted, fresh) < output_error(system, balanced_truncation(system, 6)[0], fresh)
    assert output_error(system, weighted, u) < 1


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(2, 12),
    rank=st.integers(1, 11),
    directions=st.integers(1, 12),
    spread=st.floats(0, 12),
    seed=st.integers(0, 10**6),
)
def test_it_is_stable_for_any_covariance(order: int, rank: int, directions: int, spread: float, seed: int) -> None:
    """Badly scaled and singular ones too; what cannot be diagonalised is refused, never written."""
    system = system_of(order, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(order, directions, generator=generator, dtype=torch.complex128)
    factor = factor * 10 ** (-spread * torch.rand(order, 1, generator=generator, dtype=torch.float64))
    P = factor @ factor.mH
    try:
        truncation = weighted_truncation(system, min(rank, order), P)
    except TruncationError:
        return
    assert bool((project(system, truncation).lam.abs() < 1).all())


def test_states_that_no_input_reaches_cost_nothing() -> None:
    system = system_of(8, inputs=2)
    u = smooth_input(4, 300, 2, 0.5, seed=3)
    u[..., 1] = 0  # the second input is never used
    P = diagonal_state_gramian(u, system.lam, system.B)
    only_first = DiagonalLTI(system.lam, system.B[:, :1], system.C)
    few = weighted_truncation(system, 7, P)
    exact, _ = balanced_truncation(only_first, 7)
    assert output_error(system, project(system, few), u) < 10 * output_error(only_first, exact, u[..., :1]) + 1e-6


def test_every_system_of_a_batch_is_cut_for_itself() -> None:
    batch = system_of(8, inputs=1, outputs=1, batch=(3,))
    P = torch.stack([low_pass_states(DiagonalLTI(*parts), 0.9) for parts in zip(batch.lam, batch.B, batch.C)])
    together = project(batch, weighted_truncation(batch, 3, P))
    for row, parts in enumerate(zip(batch.lam, batch.B, batch.C)):
        single = DiagonalLTI(*parts)
        alone = project(single, weighted_truncation(single, 3, P[row]))
        torch.testing.assert_close(
            DiagonalLTI(together.lam[row], together.B[row], together.C[row]).impulse_response(40),
            alone.impulse_response(40),
            rtol=1e-8,
            atol=1e-9,
        )


def test_a_system_without_input_is_filled_up_with_inert_states() -> None:
    batch = system_of(6, inputs=1, outputs=1, batch=(2,))
    P = batch.controllability_gramian()
    P[1] = 0
    truncation = weighted_truncation(batch, 3, P)
    assert truncation.active.tolist() == [[True] * 3, [False] * 3]


def test_interpolation_with_measured_gramians_keeps_poles() -> None:
    system = system_of(10)
    truncation = interpolative_truncation(low_pass_states(system, 0.9), system.observability_gramian(), 4)
    reduced = project(system, truncation)
    torch.testing.assert_close(reduced.lam, system.lam[truncation.indices])
    torch.testing.assert_close(reduced.B, system.B[truncation.indices])


def test_what_does_not_fit_is_refused() -> None:
    system = system_of(5)
    with pytest.raises(DimensionError, match=r"P has shape \(4, 4\)"):
        weighted_truncation(system, 2, torch.eye(4, dtype=torch.complex128))
    with pytest.raises(DimensionError, match="Q has shape"):
        weighted_hankel_decomposition(system, system.controllability_gramian(), torch.eye(3))
    with pytest.raises(TruncationError, match="stands above rounding"):
        weighted_truncation(system, 2, torch.zeros(5, 5, dtype=torch.complex128))
    unstable = DiagonalLTI(torch.tensor([1.5, 0.5]), torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(UnstableSystemError):
        weighted_truncation(unstable, 1, torch.eye(2))
