"""Gramians and their factors against scipy, python-control with slycot, and their own equations."""

from __future__ import annotations

import control
import numpy as np
import pytest
import torch

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError, UnstableSystemError
from hf_compressm.systems import (
    controllability_factor,
    controllability_gramian,
    gramian_factor,
    lyapunov_residual,
    observability_factor,
    observability_gramian,
)

from .oracles import KINDS, random_system, real_matrices, scipy_gramians

TIME_DOMAINS = ["discrete", "continuous"]
EPS = torch.finfo(torch.float64).eps


def largest_rowwise_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of a Gramian in units of `sqrt(P_ii P_jj)`, which is how its rounding should scale."""
    size = expected.diagonal().real.sqrt()
    scale = torch.outer(size, size)
    assert (found - expected)[scale == 0].abs().sum() == 0
    return ((found - expected).abs() / torch.where(scale > 0, scale, 1)).max().item()


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_gramians_solve_their_equations(kind: str, time_domain: str) -> None:
    for seed in range(20):
        system = random_system(kind, seed, time_domain)
        P, Q = system.controllability_gramian(), system.observability_gramian()
        assert torch.equal(P, P.mH)
        assert torch.equal(Q, Q.mH)
        assert lyapunov_residual(P, system.lam, system.B, time_domain) <= 1e-10
        assert lyapunov_residual(Q, system.lam.conj(), system.C.mH, time_domain) <= 1e-10


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", ["siso", "mimo", "more_inputs_than_states", "single_state", "equal_poles"])
def test_gramians_agree_with_scipy(kind: str, time_domain: str) -> None:
    for seed in range(3):
        system = random_system(kind, seed, time_domain)
        for found, expected in zip(
            (system.controllability_gramian(), system.observability_gramian()), scipy_gramians(system), strict=True
        ):
            assert np.abs(found.numpy() - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_gramians_agree_with_python_control(time_domain: str) -> None:
    system = random_system("mimo", 1, time_domain)
    A, B, C = real_matrices(system)
    reference = control.ss(A, B, C, np.zeros((C.shape[0], B.shape[1])), True if time_domain == "discrete" else 0)
    n = system.order
    for found, kind in ((system.controllability_gramian(), "c"), (system.observability_gramian(), "o")):
        real_form = control.gram(reference, kind)
        expected = real_form[:n, :n] + 1j * real_form[n:, :n]
        assert np.abs(found.numpy() - expected).max() < 1e-11 * np.abs(expected).max()


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_reproduce_the_gramians_row_by_row(kind: str, time_domain: str) -> None:
    for seed in range(5):
        system = random_system(kind, seed, time_domain)
        L_P = controllability_factor(system.lam, system.B, time_domain)
        L_Q = observability_factor(system.lam, system.C, time_domain)
        assert largest_rowwise_error(L_P @ L_P.mH, system.controllability_gramian()) < 1e-13
        assert largest_rowwise_error(L_Q @ L_Q.mH, system.observability_gramian()) < 1e-13


def test_elimination_takes_the_largest_remaining_variance_first() -> None:
    """Column by column the same as a pivoted Cholesky factorisation of the Gramian, up to the phase of a column."""
    for time_domain in TIME_DOMAINS:
        system = random_system("mimo", 2, time_domain)
        remaining = system.controllability_gramian()
        for column in controllability_factor(system.lam, system.B, time_domain).unbind(-1)[:8]:
            pivot = remaining.diagonal().real.argmax()
            expected = remaining[:, pivot] / remaining[pivot, pivot].sqrt()
            assert torch.allclose(column.abs(), expected.abs(), rtol=1e-6, atol=1e-8)
            remaining = remaining - torch.outer(expected, expected.conj())


def test_a_factor_is_zero_past_the_rank() -> None:
    lam = torch.tensor([0.5, 0.5, 0.9, 0.1])
    B = torch.tensor([[1.0], [2.0], [0.0], [1.0]])
    factor = controllability_factor(lam, B)
    assert [column.abs().max() > 1e-3 for column in factor.unbind(-1)] == [True, True, False, False]
    assert factor[:, 2:].abs().max() == 0


def test_a_factor_survives_inputs_of_extreme_size() -> None:
    lam = torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)
    size = torch.tensor([[1e200], [1.0], [1e-100]], dtype=torch.float64)
    factor = controllability_factor(lam, size * torch.ones(3, 2))
    ordinary = controllability_factor(lam, torch.ones(3, 2))
    rows = torch.linalg.vector_norm((factor / size), dim=-1)
    assert torch.allclose(rows, torch.linalg.vector_norm(ordinary, dim=-1), rtol=1e-14)


def test_batches_are_independent_systems() -> None:
    system = random_system("mimo", 0, batch=(2, 3))
    L_P = controllability_factor(system.lam, system.B)
    for index in np.ndindex(2, 3):
        lam, B, C = system.lam[index], system.B[index], system.C[index]
        assert torch.allclose(system.controllability_gramian()[index], controllability_gramian(lam, B), rtol=1e-12)
        assert torch.allclose(system.observability_gramian()[index], observability_gramian(lam, C), rtol=1e-12)
        assert torch.allclose(L_P[index], controllability_factor(lam, B), rtol=1e-10, atol=1e-12)


def test_the_residual_sees_a_lost_conjugate() -> None:
    system = random_system("mimo", 3)
    Q = system.observability_gramian()
    assert lyapunov_residual(Q, system.lam, system.C.mH) > 1e-2
    assert lyapunov_residual(Q.conj(), system.lam.conj(), system.C.mH) > 1e-2
    assert lyapunov_residual(1.01 * Q, system.lam.conj(), system.C.mH) > 1e-3


def test_the_residual_of_a_batch_and_of_no_input() -> None:
    system = random_system("siso", 0, batch=(4,))
    assert lyapunov_residual(system.controllability_gramian(), system.lam, system.B).shape == (4,)
    lam, B = torch.tensor([0.5]), torch.zeros(1, 1)
    assert lyapunov_residual(torch.zeros(1, 1), lam, B) == 0
    assert lyapunov_residual(torch.ones(1, 1), lam, B) == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_low_precision_is_promoted(dtype: torch.dtype) -> None:
    P = controllability_gramian(torch.tensor([0.5, 0.25]).to(dtype), torch.ones(2, 1).to(dtype))
    assert P.dtype == torch.complex128
    assert P[0, 1].real.item() == pytest.approx(1 / (1 - 0.125), rel=1e-15)


class TestArguments:
    def test_unstable(self) -> None:
        with pytest.raises(UnstableSystemError, match=r"lam\[1\].*\|lam\| = 1\.25"):
            controllability_gramian(torch.tensor([0.5, 1.25]), torch.ones(2, 1))
        with pytest.raises(UnstableSystemError):
            observability_factor(torch.tensor([0.5, 0.25]), torch.ones(1, 2), "continuous")

    def test_shapes(self) -> None:
        with pytest.raises(DimensionError, match=r"lam has shape \(2,\) and B \(3, 1\)"):
            controllability_gramian(torch.zeros(2), torch.ones(3, 1))
        with pytest.raises(DimensionError, match="C transposed"):
            observability_gramian(torch.zeros(2), torch.ones(2, 3))
        with pytest.raises(DimensionError, match="N >= 1"):
            controllability_factor(torch.zeros(0), torch.ones(0, 1))
        with pytest.raises(DimensionError, match="gramian has shape"):
            lyapunov_residual(torch.eye(3), torch.zeros(2), torch.ones(2, 1))

    def test_not_finite(self) -> None:
        with pytest.raises(NotFiniteError, match=r"lam has 1 of 2 entries.*index \(1,\) \(nan\)"):
            controllability_gramian(torch.tensor([0.5, float("nan")]), torch.ones(2, 1))
        with pytest.raises(NotFiniteError, match="B has"):
            controllability_factor(torch.tensor([0.5]), torch.tensor([[float("inf")]]))

    def test_time_domain(self) -> None:
        with pytest.raises(ConfigurationError, match="time_domain"):
            controllability_gramian(torch.tensor([0.5]), torch.ones(1, 1), "z")

    def test_devices(self) -> None:
        with pytest.raises(DimensionError, match="one device"):
            controllability_gramian(torch.tensor([0.5]), torch.ones(1, 1, device="meta"))


class TestGramianFactor:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_reproduces_a_positive_definite_matrix(self, dtype: torch.dtype) -> None:
        X = torch.randn(3, 8, 20, dtype=dtype)
        M = X @ X.mH
        L = gramian_factor(M)
        assert L.dtype == dtype
        assert torch.allclose(L @ L.mH, M, rtol=1e-12, atol=1e-12)

    def test_reveals_the_rank(self) -> None:
        X = torch.randn(10, 4, dtype=torch.complex128)
        L = gramian_factor(X @ X.mH)
        assert (L.abs().amax(dim=0) > 0).tolist() == [True] * 4 + [False] * 6
        assert torch.allclose(L @ L.mH, X @ X.mH, rtol=1e-10, atol=1e-13)

    def test_error_is_relative_to_every_state(self) -> None:
        scale = 10 ** torch.linspace(-12, 12, 12, dtype=torch.float64)
        X = torch.randn(12, 30, dtype=torch.float64) * scale[:, None]
        M = X @ X.T
        L = gramian_factor(M)
        assert largest_rowwise_error(L @ L.mH, M) < 1e-13

    def test_a_zero_matrix_and_dead_states(self) -> None:
        assert gramian_factor(torch.zeros(3, 3)).abs().max() == 0
        L = gramian_factor(torch.diag(torch.tensor([0.0, 4.0, 0.0])))
        assert torch.equal(L @ L.T, torch.diag(torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)))

    def test_negative_rounding_is_clipped(self) -> None:
        X = torch.randn(6, 2, dtype=torch.float64)
        M = X @ X.T - 1e-14 * torch.eye(6, dtype=torch.float64)
        assert torch.linalg.eigvalsh(M).min() < 0
        L = gramian_factor(M)
        assert torch.allclose(L @ L.T, M, atol=1e-12)

    def test_rounding_is_that_of_the_input_dtype(self) -> None:
        X = torch.randn(6, 2)
        M = X @ X.T - 1e-5 * torch.eye(6)
        assert gramian_factor(M).dtype == torch.float64
        with pytest.raises(ConfigurationError, match="indefinite"):
            gramian_factor(M.double())

    def test_between_rounding_and_indefinite(self) -> None:
        eye = torch.eye(3, dtype=torch.float64)
        eye[0, 0] = -1e-9
        assert torch.equal(gramian_factor(eye) @ gramian_factor(eye).T, eye.clamp_min(0))
        eye[0, 0] = -1e-7
        with pytest.raises(ConfigurationError, match=r"rounding explains 1\.49e-08"):
            gramian_factor(eye)

    @pytest.mark.parametrize("matrix", [[[1.0, 2.0], [2.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    def test_clearly_indefinite(self, matrix: list) -> None:
        good = torch.eye(2).expand(2, 2, 2)
        with pytest.raises(ConfigurationError, match="P is indefinite"):
            gramian_factor(torch.cat([good, torch.tensor([matrix])]), name="P")

    def test_not_hermitian(self) -> None:
        with pytest.raises(ConfigurationError, match=r"not Hermitian: it differs from its Hermitian part by 0\.5"):
            gramian_factor(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        with pytest.raises(ConfigurationError, match="not Hermitian"):
            gramian_factor(torch.tensor([[1.0, 0.5j], [0.5j, 1.0]]))

    def test_not_square_or_not_finite(self) -> None:
        for shape in [(2, 3), (3,), (0, 0)]:
            with pytest.raises(DimensionError, match="shape"):
                gramian_factor(torch.zeros(shape))
        with pytest.raises(NotFiniteError, match=r"index \(0, 1\)"):
            gramian_factor(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
