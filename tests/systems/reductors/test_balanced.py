"""Balanced truncation against SLICOT and pyMOR, against its bound, and against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import slycot
import torch
from pymor.core.logger import set_log_levels
from pymor.models.iosys import LTIModel
from pymor.reductors.bt import BTReductor

from hf_compressm.errors import DimensionError, TruncationError, UnstableSystemError
from hf_compressm.systems import (
    DiagonalLTI,
    HankelDecomposition,
    balanced_truncation,
    balancing_truncation,
    error_bound,
    hankel_decomposition,
    verification_frequencies,
)
from hf_compressm.systems.reductors import balanced

from ..oracles import KINDS, complex_response, random_system, real_matrices, transfer

TIME_DOMAINS = ["discrete", "continuous"]
set_log_levels({"pymor": "ERROR"})


def largest_error(system: DiagonalLTI, reduced: DiagonalLTI) -> float:
    """Largest `|G - G_r|` on resonances and a fine grid, by dense solves that share no code with the library."""
    omega = verification_frequencies(system, reduced).numpy()
    omega = np.sort(np.concatenate([omega, np.linspace(-3.1, 3.1, 100)]))
    omega = np.concatenate([omega, (omega[1:] + omega[:-1]) / 2])
    return float(np.linalg.norm(transfer(system, omega) - transfer(reduced, omega), ord=2, axis=(-2, -1)).max())


def member(system: DiagonalLTI, i: int) -> DiagonalLTI:
    return DiagonalLTI(system.lam[i], system.B[i], system.C[i], system.D[i], system.time_domain)


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_at_every_usable_rank(kind: str, time_domain: str) -> None:
    for seed in range(3):
        system = random_system(kind, seed, time_domain)
        sigma = system.hankel_singular_values()
        for r in range(1, int(system.hankel_decomposition().usable_rank) + 1):
            reduced, truncation = balanced_truncation(system, r)
            assert (reduced.order, truncation.state_size, truncation.full_size) == (r, r, system.order)
            assert reduced.is_stable()
            assert reduced.time_domain == time_domain
            assert torch.equal(reduced.D, system.D)
            assert largest_error(system, reduced) <= error_bound(sigma, r) + 1e-10 * sigma[0]


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_systems_in_batches(kind: str, time_domain: str) -> None:
    """30 systems of each kind at once; a batch is reduced as its members are."""
    system = random_system(kind, seed=11, time_domain=time_domain, batch=(30,))
    usable = int(system.hankel_decomposition().usable_rank.min())
    for r in {max(1, usable // 2), usable}:
        reduced, truncation = balanced_truncation(system, r)
        assert truncation.T.shape == (30, system.order, r)
        assert reduced.is_stable()
        assert all(torch.isfinite(tensor).all() for tensor in (reduced.lam, reduced.B, reduced.C))
        alone, _ = balanced_truncation(member(system, 17), r)
        omega = verification_frequencies(alone)
        together = member(reduced, 17).frequency_response(omega)
        size = system.hankel_singular_values()[17, 0]
        assert (alone.frequency_response(omega) - together).abs().max() < 1e-7 * size


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", ["siso", "mimo", "real_poles", "rank_deficient_B"])
def test_agrees_with_slicot(kind: str, time_domain: str) -> None:
    system = random_system(kind, 4, time_domain)
    A, B, C = real_matrices(system)
    dico = "D" if time_domain == "discrete" else "C"
    omega = np.array([-2.0, -0.3, 0.1, 1.0])
    for r in (1, 3, 5):
        found = transfer(balanced_truncation(system, r)[0], omega)
        nr, *matrices, _ = slycot.ab09ad(dico, "B", "N", len(A), B.shape[1], len(C), A, B, C, nr=2 * r, tol=0)
        assert nr == 2 * r
        Ar, Br, Cr = matrices
        identity = np.eye(nr)
        if time_domain == "discrete":
            reference = np.stack([Cr @ np.linalg.solve(identity - np.exp(-1j * w) * Ar, Br) for w in omega])
        else:
            reference = np.stack([Cr @ np.linalg.solve(1j * w * identity - Ar, Br) for w in omega])
        expected = complex_response(reference)
        assert np.abs(found - expected).max() < 1e-7 * np.abs(expected).max()


def test_agrees_with_pymor() -> None:
    system = random_system("mimo", 4, "continuous")
    rom = BTReductor(LTIModel.from_matrices(*real_matrices(system))).reduce(r=10)
    reduced, _ = balanced_truncation(system, 5)
    omega = np.array([-2.0, 0.1, 1.0])
    expected = complex_response(np.stack([rom.transfer_function.eval_tf(1j * w) for w in omega]))
    assert np.abs(transfer(reduced, omega) - expected).max() < 1e-8 * np.abs(expected).max()


def test_a_continuous_reduced_system_has_the_leading_singular_values() -> None:
    """In continuous time the reduced system is balanced again; in discrete time it is not, which is well known."""
    system = random_system("mimo", 5, "continuous")
    sigma = system.hankel_singular_values()
    for r in (2, 5, 9):
        reduced, _ = balanced_truncation(system, r)
        assert torch.allclose(reduced.hankel_singular_values(), sigma[:r], rtol=1e-7)


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_balanced_coordinates_balance_both_gramians(time_domain: str) -> None:
    system = random_system("mimo", 6, time_domain, batch=(2,))
    P, Q = system.controllability_gramian(), system.observability_gramian()
    for decomposition in (system.hankel_decomposition(), hankel_decomposition(P, Q)):
        truncation = balancing_truncation(decomposition, 7)
        expected = torch.diag_embed(decomposition.sigma[:, :7]).to(P)
        assert torch.allclose(truncation.W.mH @ P @ truncation.W, expected, rtol=1e-6, atol=1e-8)
        assert torch.allclose(truncation.T.mH @ Q @ truncation.T, expected, rtol=1e-6, atol=1e-8)


def test_real_gramians_give_a_real_truncation() -> None:
    X, Y = torch.randn(6, 50, dtype=torch.float64), torch.randn(6, 50, dtype=torch.float64)
    truncation = balancing_truncation(hankel_decomposition(X @ X.T, Y @ Y.T), 3)
    assert truncation.T.dtype == torch.float64


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_the_truncation_leads_to_the_reduced_system(time_domain: str) -> None:
    system = random_system("mimo", 7, time_domain)
    reduced, truncation = balanced_truncation(system, 6)
    T, W = truncation.T, truncation.W
    assert torch.allclose(W.mH @ T, torch.eye(6, dtype=T.dtype), atol=1e-12)
    assert torch.allclose(W.mH @ torch.diag(system.lam) @ T, torch.diag(reduced.lam), atol=1e-11)
    assert torch.equal(reduced.B, W.mH @ system.B)
    assert torch.equal(reduced.C, system.C @ T)
    assert truncation.indices is None


@pytest.mark.parametrize("kind", ["siso", "rank_deficient_B", "dead_states"])
def test_the_full_order_returns_the_system_itself(kind: str) -> None:
    system = random_system(kind, 0, batch=(2,))
    reduced, truncation = balanced_truncation(system, system.order)
    assert reduced is system
    assert truncation.is_selection
    assert torch.equal(truncation.T, torch.eye(system.order, dtype=torch.complex128).expand(2, -1, -1))


@pytest.mark.parametrize("kind", ["equal_poles", "dead_states"])
def test_a_system_with_superfluous_states_is_reproduced_exactly(kind: str) -> None:
    system = random_system(kind, 1)
    usable = int(system.hankel_decomposition().usable_rank)
    assert usable < system.order
    reduced, _ = balanced_truncation(system, usable)
    expected = system.impulse_response(100)
    assert (reduced.impulse_response(100) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("kind", ["equal_poles", "dead_states"])
def test_more_states_than_there_are_directions(kind: str) -> None:
    system = random_system(kind, 1)
    usable = int(system.hankel_decomposition().usable_rank)
    with pytest.raises(
        TruncationError, match=f"r is {usable + 1}, but only {usable} .* largest usable rank is {usable}"
    ):
        balanced_truncation(system, usable + 1)


def test_the_poorest_system_of_a_batch_decides() -> None:
    lam = torch.tensor([[0.9, 0.5, -0.3], [0.9, 0.9, -0.3]])
    system = DiagonalLTI(lam, torch.ones(2, 3, 1), torch.ones(2, 1, 3))
    assert system.hankel_decomposition().usable_rank.tolist() == [3, 2]
    assert balanced_truncation(system, 2)[0].is_stable()
    with pytest.raises(TruncationError, match="reduce to at most 2 states"):
        balancing_truncation(system.hankel_decomposition(), 3)


def test_a_response_of_zero() -> None:
    system = DiagonalLTI(torch.tensor([0.5, 0.9]), torch.zeros(2, 1), torch.ones(1, 2))
    with pytest.raises(TruncationError, match="a response of zero has no balanced coordinates"):
        balanced_truncation(system, 1)


def test_a_nearly_defective_result_is_refused() -> None:
    """Between an angle where two of three states keep real poles and one where they keep a pair is a double pole."""

    def system_at(angle: float) -> DiagonalLTI:
        pair = 0.8 * np.exp(1j * angle)
        lam = torch.tensor([pair, pair.conjugate(), 0.3], dtype=torch.complex128)
        return DiagonalLTI(lam, torch.ones(3, 1), torch.ones(1, 3))

    def keeps_a_pair(angle: float) -> bool:
        system = system_at(angle)
        balanced = balancing_truncation(system.hankel_decomposition(), 2)
        A = balanced.W.mH @ torch.diag(system.lam) @ balanced.T
        return bool(((A[0, 0] - A[1, 1]) ** 2 + 4 * A[0, 1] * A[1, 0]).real < 0)

    real, complex_ = 0.2, 0.3
    for _ in range(50):
        middle = (real + complex_) / 2
        real, complex_ = (real, middle) if keeps_a_pair(middle) else (middle, complex_)
    with pytest.raises(TruncationError, match=r"nearly defective: its eigenvectors have condition number .*e\+0[6-9]"):
        balanced_truncation(system_at(real), 2)
    assert balanced_truncation(system_at(real), 1)[0].is_stable()


def test_the_condition_limit_is_the_callers() -> None:
    system = random_system("mimo", 0)
    balanced_truncation(system, 5)
    with pytest.raises(TruncationError, match="allowed is 1"):
        balanced_truncation(system, 5, condition_limit=1.0)


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_an_unstable_result_is_refused(time_domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = random_system("siso", 0, time_domain)
    eig = torch.linalg.eig

    def wrong_eig(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam, X = eig(A)
        return (3 * lam / lam.abs() if time_domain == "discrete" else lam.real.abs() + 0j), X

    monkeypatch.setattr(balanced, "eig", wrong_eig)
    with pytest.raises(TruncationError, match=r"not stable: .* = -"):
        balanced_truncation(system, 4)


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    system = random_system("siso", 0)
    eig = torch.linalg.eig
    monkeypatch.setattr(balanced, "eig", lambda A: (0.9 * eig(A)[0], eig(A)[1]))
    with pytest.raises(TruncationError, match="breaks its error bound"):
        balanced_truncation(system, 8)


def test_a_decomposition_of_something_else_is_refused() -> None:
    L = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(TruncationError, match="singular at r = 2"):
        balancing_truncation(HankelDecomposition(L, L, eye, torch.ones(2, dtype=torch.float64), eye), 2)


def test_s4d_channels_in_one_call() -> None:
    """S4D-Lin: 64 channels of 32 poles, step sizes over two decades, all reduced to the same size."""
    generator = torch.Generator().manual_seed(0)
    step = 10 ** (-3 + 2 * torch.rand(64, 1, generator=generator, dtype=torch.float64))
    lam = torch.exp(step * torch.complex(torch.full((32,), -0.5), torch.pi * torch.arange(32.0)).to(torch.complex128))
    C = torch.randn(64, 1, 32, generator=generator, dtype=torch.complex128)
    system = DiagonalLTI(lam, torch.ones(64, 32, 1), C)
    reduced, _ = balanced_truncation(system, 12)
    error = (system.impulse_response(2000) - reduced.impulse_response(2000)).abs().sum(dim=1).flatten()
    # The sum of an impulse response is at most twice the sum of the Hankel singular values of its system.
    tail = system.hankel_singular_values()[:, 12:].sum(dim=-1) + reduced.hankel_singular_values().sum(dim=-1) * 1e-9
    assert (error <= 2 * 12 * 2 * tail).all()
    assert reduced.is_stable()


def test_an_lru_layer() -> None:
    """LRU: 128 states on a ring of radius 0.9 to 0.999, 16 channels."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 128, generator=generator, dtype=torch.float64)
    radius = (0.9**2 + uniform[0] * (0.999**2 - 0.9**2)).sqrt()
    lam = torch.polar(radius, 0.4 * uniform[1])
    B = torch.randn(128, 16, generator=generator, dtype=torch.complex128) * (1 - radius**2).sqrt()[:, None]
    system = DiagonalLTI(lam, B, torch.randn(16, 128, generator=generator, dtype=torch.complex128))
    sigma = system.hankel_singular_values()
    reduced, _ = balanced_truncation(system, 48)
    assert largest_error(system, reduced) <= error_bound(sigma, 48)
    assert error_bound(sigma, 48) < 0.2 * sigma.sum()


def test_needs_no_gradient() -> None:
    lam = torch.tensor([0.9, 0.5, -0.3], requires_grad=True)
    reduced, truncation = balanced_truncation(DiagonalLTI(lam, torch.ones(3, 1), torch.ones(1, 3)), 2)
    assert not reduced.lam.requires_grad
    assert not truncation.T.requires_grad


class TestArguments:
    @pytest.mark.parametrize("r", [0, 11, -1, 2.0, None])
    def test_rank(self, r: object) -> None:
        with pytest.raises(DimensionError, match="r "):
            balanced_truncation(random_system("siso", 0), r)

    def test_unstable_system(self) -> None:
        system = DiagonalLTI(torch.tensor([0.5, 1.1]), torch.ones(2, 1), torch.ones(1, 2))
        for r in (1, 2):
            with pytest.raises(UnstableSystemError, match=r"lam\[1\]"):
                balanced_truncation(system, r)
