"""A truncation applied to a system gives the projected system, or an error."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import DiagonalLTI, Truncation, balanced_truncation, project

from .oracles import random_system


def test_selection_drops_modes() -> None:
    system = random_system("mimo", 0)
    reduced = project(system, Truncation.from_indices([1, 5, 6], full_size=12))
    kept = [1, 5, 6]
    assert torch.equal(reduced.lam, system.lam[kept])
    assert torch.equal(reduced.B, system.B[kept])
    assert torch.equal(reduced.C, system.C[:, kept])
    assert torch.equal(reduced.D, system.D)


def test_a_fold_goes_to_the_readout() -> None:
    system = DiagonalLTI(torch.tensor([0.5, 0.5]), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 10.0]]))
    reduced = project(system, Truncation.from_indices([0], full_size=2, T=torch.tensor([[1.0], [2.0]])))
    assert reduced.C.real.tolist() == [[21.0]]
    assert torch.allclose(reduced.impulse_response(20), system.impulse_response(20))


def test_one_truncation_for_a_batch_and_the_time_domain_stays() -> None:
    system = random_system("siso", 0, "continuous", batch=(4,))
    reduced = project(system, Truncation.from_indices([0, 9], full_size=10))
    assert reduced.batch_shape == (4,)
    assert reduced.time_domain == "continuous"
    own = Truncation.from_indices(torch.tensor([[0, 1]] * 3 + [[2, 3]]), full_size=10)
    assert torch.equal(project(system, own).lam[3], system.lam[3, 2:4])


def test_reproduces_a_balanced_truncation() -> None:
    system = random_system("mimo", 1)
    reduced, truncation = balanced_truncation(system, 6)
    again = project(system, truncation)
    assert torch.allclose(again.lam, reduced.lam, rtol=1e-12)
    assert torch.equal(again.B, reduced.B)
    assert torch.equal(again.C, reduced.C)


def test_arguments() -> None:
    system = random_system("siso", 0)
    with pytest.raises(DimensionError, match="for 3 states and the system has 10"):
        project(system, Truncation.from_indices([0], full_size=3))
    with pytest.raises(DimensionError, match="must broadcast"):
        project(system, Truncation.from_indices([[0], [1]], full_size=10))
    basis = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q
    with pytest.raises(TruncationError, match="couples its states"):
        project(system, Truncation(basis, basis))
    on_meta = DiagonalLTI.__new__(DiagonalLTI)  # a meta tensor holds no values that the constructor could check
    object.__setattr__(on_meta, "lam", torch.zeros(10, device="meta"))
    with pytest.raises(DimensionError, match="one device"):
        project(on_meta, Truncation.from_indices([0], full_size=10))
