"""What every reductor promises, asked of all of them: add a row to `REDUCTORS` for a new one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_compressm.errors import TruncationError
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    balanced_truncation,
    diagonal_hankel_scores,
    error_bound,
    interpolation_residual,
    interpolative_truncation,
    project,
    require_error_bound,
    selection_truncation,
)

from ..oracles import KINDS, random_system


def balanced(system: DiagonalLTI, r: int) -> Truncation:
    return balanced_truncation(system, r)[1]


def interpolative(system: DiagonalLTI, r: int) -> Truncation:
    return interpolative_truncation(system.controllability_gramian(), system.observability_gramian(), r)


def selection(system: DiagonalLTI, r: int) -> Truncation:
    scores = diagonal_hankel_scores(system.controllability_gramian(), system.observability_gramian())
    return selection_truncation(scores, r)


# reductor -> its bound on the H-infinity error, or None where none is known
REDUCTORS: dict[Callable, Callable | None] = {balanced: error_bound, interpolative: None, selection: None}


@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reductor", REDUCTORS, ids=lambda reductor: reductor.__name__)
def test_reduced_systems_are_stable_finite_and_within_the_bound(
    reductor: Callable, kind: str, time_domain: str
) -> None:
    for seed in range(2):
        system = random_system(kind, 20 + seed, time_domain)
        for r in range(1, system.order + 1, 3):
            if reductor is balanced and system.hankel_decomposition().usable_rank < r < system.order:
                with pytest.raises(TruncationError, match="stand above rounding"):
                    reductor(system, r)
                continue
            reduced = project(system, reductor(system, r))
            assert reduced.order == r
            assert reduced.is_stable()
            assert reduced.time_domain == time_domain
            bound = REDUCTORS[reductor]
            if bound is not None:
                require_error_bound(system, reduced, bound(system.hankel_singular_values(), r), amplification=1e3)


@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
@pytest.mark.parametrize("reductor", REDUCTORS, ids=lambda reductor: reductor.__name__)
def test_keeping_all_states_changes_nothing(reductor: Callable, time_domain: str) -> None:
    system = random_system("mimo", 0, time_domain)
    truncation = reductor(system, system.order)
    assert torch.equal(truncation.T.real, torch.eye(12, dtype=torch.float64))
    reduced = project(system, truncation)
    assert torch.equal(reduced.lam, system.lam)
    assert torch.equal(reduced.C, system.C)


@pytest.mark.parametrize("seed", range(5))
def test_the_better_reductor_loses_less(seed: int) -> None:
    """Balanced coordinates lose the least observable energy, then interpolation, then selection."""
    system = random_system("mimo", seed)
    P, Q = system.controllability_gramian(), system.observability_gramian()
    for r in (2, 4, 8):
        losses = [interpolation_residual(P, Q, reductor(system, r)) for reductor in REDUCTORS]
        assert losses == sorted(losses)
