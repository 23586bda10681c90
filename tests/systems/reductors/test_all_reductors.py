"""What every registered reductor promises; one that is added is asked the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm.compression.measure.layer_gramians import ClosedFormGramians, EmpiricalGramians
from hf_compressm.errors import TruncationError
from hf_compressm.systems import DiagonalLTI, StateChoice, Truncation, interpolation_residual, project
from hf_compressm.systems.reductors import registered_reductors
from hf_compressm.systems.time_domain import stability_margin

from ..oracles import KINDS, random_system
from ..strategies import quick, systems

REDUCTORS = registered_reductors()
every_reductor = pytest.mark.parametrize("name", REDUCTORS)
of_systems = pytest.mark.parametrize("name", [name for name in REDUCTORS if REDUCTORS[name].reduces_systems])
# Refusals that a system or a pair of Gramians can deserve; any other is a fault.
REFUSALS = ("stands above rounding", "nearly defective", "differs from the identity")


def truncation_or_refusal(name: str, gramians: ClosedFormGramians | EmpiricalGramians, r: int) -> Truncation | None:
    try:
        return REDUCTORS[name].truncate(gramians, r, StateChoice())
    except TruncationError as refusal:
        assert any(reason in str(refusal) for reason in REFUSALS), refusal
        return None


def without_inert_states(truncation: Truncation) -> Truncation:
    if truncation.active is None:
        return truncation
    return Truncation(T=truncation.T[:, truncation.active], W=truncation.W[:, truncation.active])


def check_promises_on_a_system(name: str, system: DiagonalLTI, r: int) -> bool:
    """Whether the reductor reduced the system; what it promises was then measured."""
    reductor, known = REDUCTORS[name], ClosedFormGramians(system)
    truncation = truncation_or_refusal(name, known, r)
    if truncation is None:
        return False
    assert truncation.T.shape == truncation.W.shape == (system.order, r)
    assert truncation.is_selection or not reductor.only_selects
    reduced = project(system, without_inert_states(truncation))
    assert reduced.time_domain == system.time_domain and reduced.is_stable()
    assert all(torch.isfinite(tensor).all() for tensor in (reduced.lam, reduced.B, reduced.C))
    if reductor.keeps_states:
        assert torch.equal(reduced.lam, system.lam[truncation.indices])
    if reductor.error_bound is not None:
        sigma = system.hankel_singular_values()
        omega = torch.cat([system.lam.angle(), system.lam.imag, torch.linspace(-3.1, 3.1, 50)])
        error = torch.linalg.matrix_norm(system.frequency_response(omega) - reduced.frequency_response(omega), ord=2)
        # Rounding of the largest pole is an error of every pole of a dense reduced matrix; the slowest feels it most.
        largest = system.lam.abs().max() if system.time_domain == "continuous" else 1.0
        spread = largest / stability_margin(system.lam, system.time_domain).min()
        assert error.max() <= reductor.error_bound(sigma, reduced.order) + (1e-9 + 1e-14 * spread) * sigma[0]
    return True


@of_systems
@quick
@given(systems(), st.floats(0, 1))
def test_ill_conditioned_systems(name: str, system: DiagonalLTI, share: float) -> None:
    reduced = check_promises_on_a_system(name, system, max(1, round(share * system.order)))
    assert reduced or not REDUCTORS[name].keeps_states


@of_systems
@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_systems_are_all_reduced(name: str, kind: str, time_domain: str) -> None:
    for seed in range(2):
        system = random_system(kind, 20 + seed, time_domain)
        for r in range(1, system.order + 1, 3):
            assert check_promises_on_a_system(name, system, r)


@every_reductor
@quick
@given(st.integers(1, 8), st.integers(0, 10), st.floats(0, 6), st.integers(0, 2**32), st.floats(0, 1))
def test_measured_gramians(name: str, N: int, samples: int, decades: float, seed: int, share: float) -> None:
    """Of three groups of states without a system; scaled badly, and of lower rank where there are few samples."""
    r, generator = max(1, round(share * N)), torch.Generator().manual_seed(seed)

    def gramian() -> torch.Tensor:
        scale = 10 ** (decades * (2 * torch.rand(N, 1, generator=generator, dtype=torch.float64) - 1))
        states = scale * torch.randn(3, N, samples, generator=generator, dtype=torch.float64)
        return states @ states.mT

    P, Q = gramian(), gramian()
    known = EmpiricalGramians(P, Q, P.diagonal(dim1=-2, dim2=-1), Q)
    truncation = truncation_or_refusal(name, known, r)
    if truncation is None:
        assert not REDUCTORS[name].keeps_states
        return
    assert truncation.T.shape == truncation.W.shape == (3, N, r)
    assert truncation.indices is not None or not REDUCTORS[name].keeps_states
    assert truncation.is_selection or not REDUCTORS[name].only_selects
    relative = known.decomposition.sigma / known.decomposition.sigma[:, :1].clamp_min(1e-300)
    least = relative[:, r:].square().sum(-1) / relative.square().sum(-1).clamp_min(1e-300)
    loss = interpolation_residual(P, Q, truncation)
    assert torch.isfinite(loss).all() and (loss >= least - 1e-9).all()  # Eckart and Young


@of_systems
@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
def test_keeping_all_states_changes_nothing(name: str, time_domain: str) -> None:
    system = random_system("mimo", 0, time_domain)
    truncation = REDUCTORS[name].truncate(ClosedFormGramians(system), system.order, StateChoice())
    assert torch.equal(truncation.T.real, torch.eye(12, dtype=torch.float64))
    reduced = project(system, truncation)
    assert torch.equal(reduced.lam, system.lam)
    assert torch.equal(reduced.C, system.C)


def test_every_reductor_says_whether_it_has_a_bound() -> None:
    [field] = [field for field in dataclasses.fields(REDUCTORS["selection"]) if field.name == "error_bound"]
    assert field.default is dataclasses.MISSING
    assert all(reductor.error_bound is None or callable(reductor.error_bound) for reductor in REDUCTORS.values())


@pytest.mark.parametrize("seed", range(5))
def test_the_better_reductor_loses_less(seed: int) -> None:
    """Balanced coordinates lose the least observable energy, then interpolation, then selection."""
    known = ClosedFormGramians(random_system("mimo", seed))
    for r in (2, 4, 8):
        names = ("balanced", "interpolative", "selection")
        truncations = [REDUCTORS[name].truncate(known, r, StateChoice()) for name in names]
        losses = [interpolation_residual(known.P, known.Q, truncation) for truncation in truncations]
        assert losses == sorted(losses)
