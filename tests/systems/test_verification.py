"""The measured error of a reduced system, and the check of its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hf_compressm.systems.verification as verification
from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    project,
    require_error_bound,
    response_error,
    verification_frequencies,
)

from .oracles import random_system, transfer

TIME_DOMAINS = ["discrete", "continuous"]


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_response_error_is_the_largest_singular_value(time_domain: str) -> None:
    system = random_system("mimo", 0, time_domain)
    reduced = project(system, Truncation.from_indices(range(5), full_size=12))
    omega = verification_frequencies(system, reduced)
    difference = transfer(system, omega.numpy()) - transfer(reduced, omega.numpy())
    expected = np.linalg.norm(difference, ord=2, axis=(-2, -1))
    found = response_error(system, reduced, omega)
    assert found.numpy() == pytest.approx(expected, rel=1e-8)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    system = random_system("mimo", 0, batch=(2,))
    reduced = project(system, Truncation.from_indices(range(5), full_size=12))
    omega = verification_frequencies(system, reduced)
    whole = response_error(system, reduced, omega)
    monkeypatch.setattr(verification, "_CHUNK_ENTRIES", 500)
    assert torch.allclose(response_error(system, reduced, omega), whole)
    bound = whole.amax(dim=-1)
    require_error_bound(system, reduced, bound)
    with pytest.raises(TruncationError):
        require_error_bound(system, reduced, 0.999 * bound)


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_frequencies_hit_every_resonance_on_both_sides(time_domain: str) -> None:
    system = random_system("siso", 0, time_domain, batch=(3,))
    omega = verification_frequencies(system)
    resonances = system.lam.angle() if time_domain == "discrete" else system.lam.imag
    for own, poles in zip(omega, resonances, strict=True):
        assert set(poles.tolist()) <= set(own.tolist())
    grid = omega[:, 10:]
    assert torch.isfinite(grid).all()
    if time_domain == "discrete":
        assert torch.allclose(grid.sort().values.diff(), torch.tensor(2 * torch.pi / 64, dtype=torch.float64))
    else:
        assert torch.equal(grid.sort().values, (-grid).sort().values)
        assert torch.allclose(grid.amax(dim=-1), system.lam.abs().amax(dim=-1))
        assert (grid == 0).any(dim=-1).all()


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_a_broken_bound_is_reported_with_its_numbers(time_domain: str) -> None:
    lam = torch.tensor([0.9j, 0.5]) if time_domain == "discrete" else torch.tensor([-0.1 + 3j, -1])
    system = DiagonalLTI(lam, torch.ones(2, 1), torch.ones(1, 2), time_domain=time_domain)
    reduced = project(system, Truncation.from_indices([1], full_size=2))
    require_error_bound(system, reduced, 10.0)
    peak = r"1\.5708" if time_domain == "discrete" else "3"
    with pytest.raises(TruncationError, match=rf"\|G - G_r\| = 10 at frequency {peak}, allowed is 9\.9"):
        require_error_bound(system, reduced, 9.9)


def test_the_guilty_system_of_a_batch_is_named() -> None:
    system = DiagonalLTI(torch.tensor([[0.5, 0.1], [0.5, 0.9]]), torch.ones(2, 2, 1), torch.ones(2, 1, 2))
    reduced = project(system, Truncation.from_indices([0], full_size=2))
    require_error_bound(system, reduced, torch.tensor([2.0, 10.1]))
    with pytest.raises(TruncationError, match=r"of system \[1\]"):
        require_error_bound(system, reduced, 2.0)


def test_a_changed_feedthrough_is_an_error() -> None:
    system = random_system("siso", 0)
    shifted = DiagonalLTI(system.lam, system.B, system.C, system.D + 1e-3)
    with pytest.raises(TruncationError):
        require_error_bound(system, shifted, 0.9e-3)
    require_error_bound(system, shifted, 1.1e-3)


@pytest.mark.parametrize("kind", ["near_unit_circle", "nearly_equal_poles", "badly_scaled", "mimo"])
@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
def test_rounding_is_allowed_for_but_little_more(kind: str, time_domain: str) -> None:
    system = random_system(kind, 1, time_domain)
    rounded = DiagonalLTI(system.lam * (1 + 1e-16), system.B * (1 + 1e-15), system.C, system.D, time_domain)
    require_error_bound(system, rounded, 0.0)
    wrong = DiagonalLTI(system.lam, system.B * (1 + 1e-6), system.C, system.D, time_domain)
    with pytest.raises(TruncationError):
        require_error_bound(system, wrong, 0.0)


def test_systems_that_cannot_be_compared() -> None:
    system = random_system("mimo", 0)
    others = [random_system("siso", 0), random_system("mimo", 0, "continuous"), random_system("mimo", 0, batch=(2,))]
    for other in others:
        with pytest.raises(DimensionError, match="cannot be compared"):
            response_error(system, other, torch.zeros(1))
        with pytest.raises(DimensionError, match="cannot be compared"):
            require_error_bound(system, other, 1.0)
