"""Properties of every stable system, searched for counterexamples by hypothesis."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm.errors import TruncationError
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    balanced_truncation,
    energy_rank,
    error_bound,
    gramian_factor,
    hankel_singular_values,
    interpolation_residual,
    interpolative_truncation,
    lyapunov_residual,
)
from hf_compressm.systems.time_domain import stability_margin

from .strategies import quick, systems


@quick
@given(systems())
def test_gramians_solve_their_equations(system: DiagonalLTI) -> None:
    P, Q = system.controllability_gramian(), system.observability_gramian()
    # Poles come within 1e-6 of the boundary here, and the residual's own evaluation rounds P to eps.
    assert lyapunov_residual(P, system.lam, system.B, system.time_domain) <= 1e-9
    assert lyapunov_residual(Q, system.lam.conj(), system.C.mH, system.time_domain) <= 1e-9


@quick
@given(systems())
def test_hankel_singular_values_are_a_spectrum(system: DiagonalLTI) -> None:
    direct = system.hankel_singular_values()
    formed = hankel_singular_values(system.controllability_gramian(), system.observability_gramian())
    for sigma in (direct, formed):
        assert torch.isfinite(sigma).all()
        assert (sigma >= 0).all()
        assert (sigma.diff() <= 0).all()
    assert (direct - formed).abs().max() <= 1e-6 * direct[0]
    for tolerance in (1e-6, 0.01, 0.5):
        r = energy_rank(direct, tolerance)
        assert 1 <= r <= system.order
        assert error_bound(direct, r) <= 2 * tolerance * direct.sum() * (1 + 1e-12)


@quick
@given(systems(), st.floats(0, 1))
def test_balanced_truncation_is_sound_or_refused(system: DiagonalLTI, share: float) -> None:
    r = max(1, round(share * system.order))
    try:
        reduced, truncation = balanced_truncation(system, r)
    except TruncationError as refusal:
        reason = str(refusal)
    else:
        reason = None
    if reason is not None:
        assert "stand above rounding" in reason or "nearly defective" in reason or "differs from the identity" in reason
        return
    assert reduced.is_stable()
    assert all(torch.isfinite(tensor).all() for tensor in (reduced.lam, reduced.B, reduced.C, truncation.T))
    sigma = system.hankel_singular_values()
    omega = torch.cat([system.lam.angle(), system.lam.imag, torch.linspace(-3.1, 3.1, 50)])
    error = torch.linalg.matrix_norm(system.frequency_response(omega) - reduced.frequency_response(omega), ord=2)
    # Rounding of the largest pole is an error of every pole of the dense reduced matrix, and the slowest feels it most.
    largest = system.lam.abs().max() if system.time_domain == "continuous" else 1.0
    spread = largest / stability_margin(system.lam, system.time_domain).min()
    assert error.max() <= error_bound(sigma, r) + (1e-9 + 1e-14 * spread) * sigma[0]


@quick
@given(systems(), st.floats(0, 1))
def test_interpolation_always_returns_something_sound(system: DiagonalLTI, share: float) -> None:
    r = max(1, round(share * system.order))
    P, Q = system.controllability_gramian(), system.observability_gramian()
    truncation = interpolative_truncation(P, Q, r)
    assert truncation.indices.shape == (r,)
    loss = interpolation_residual(P, Q, truncation)
    assert 0 <= loss <= 1 + 1e-6
    sigma = system.hankel_singular_values()
    if sigma[0] > 0:
        relative = sigma / sigma[0]
        tail = (relative[r:].square().sum() / relative.square().sum()).item()
        assert loss >= tail - 1e-9


@quick
@given(st.integers(1, 10), st.integers(0, 12), st.floats(0, 12), st.integers(0, 2**32), st.booleans())
def test_gramian_factor_reproduces_its_gramian(
    N: int, samples: int, decades: float, seed: int, is_complex: bool
) -> None:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, samples)) + (1j * rng.normal(size=(N, samples)) if is_complex else 0)
    X = torch.from_numpy(X * 10 ** rng.uniform(-decades, decades, (N, 1)))
    M = X @ X.mH
    L = gramian_factor(M)
    size = M.diagonal().real.sqrt()
    assert ((L @ L.mH - M).abs() <= 1e-12 * torch.outer(size, size) + 1e-300).all()
    assert int((L.abs().amax(dim=0) > 0).sum()) <= min(N, samples)


@quick
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_any_set_of_states_is_a_truncation(N: int, r: int, seed: int) -> None:
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: min(r, N)].sort().values
    truncation = Truncation.from_indices(kept, full_size=N)
    h = torch.arange(N, dtype=torch.float64)
    assert torch.equal(truncation.W.mT @ h, h[kept])
    assert torch.equal((truncation.T @ (truncation.W.mT @ h))[kept], h[kept])
