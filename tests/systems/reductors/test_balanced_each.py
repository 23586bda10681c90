"""Balanced truncation of each system of a batch, inert states, and decompositions of limited resolution."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import (
    COARSE_RESOLUTION,
    DiagonalLTI,
    Truncation,
    balanced_truncation,
    balanced_truncation_of_each,
    balancing_truncation,
    balancing_truncation_of_each,
    error_bound,
    hankel_decomposition,
    project,
    require_error_bound,
    response_error,
    verification_frequencies,
)


def random_system(*batch: int, n: int = 10, inputs: int = 1, outputs: int = 1, seed: int = 0) -> DiagonalLTI:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*batch, *shape, generator=generator, dtype=torch.complex128)  # noqa: E731
    radius = 0.2 + 0.79 * torch.rand(*batch, n, generator=generator, dtype=torch.float64)
    return DiagonalLTI(torch.polar(radius, 6.28 * torch.rand(*batch, n, generator=generator).double()),
                       normal(n, inputs), normal(outputs, n))  # fmt: skip


def test_healthy_systems_are_cut_as_by_balanced_truncation() -> None:
    system = random_system(2, 3)
    truncation = balanced_truncation_of_each(system, 4)
    assert truncation.active is None
    expected, _ = balanced_truncation(system, 4)
    found = project(system, truncation)
    omega = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(found.frequency_response(omega), expected.frequency_response(omega))


def test_systems_with_too_few_states_get_inert_ones() -> None:
    system = random_system(4)
    C = system.C.clone()
    C[1], C[2, :, 3:] = 0, 0
    system = DiagonalLTI(system.lam, system.B, C)
    truncation = balanced_truncation_of_each(system, 6)
    assert truncation.active.sum(-1).tolist() == [6, 0, 3, 6]
    reduced = project(system, truncation)
    require_error_bound(system, reduced, torch.as_tensor(error_bound(system.hankel_singular_values(), 6)), 1e4)
    exact = response_error(system, reduced, verification_frequencies(system, reduced)).amax(-1)
    assert (exact[1:3] < 1e-10).all()
    assert (reduced.lam[~truncation.active] == 0).all()


def test_a_system_that_fails_its_checks_takes_the_next_lower_rank(monkeypatch) -> None:
    import hf_compressm.systems.reductors.balanced_each as module

    system, original = random_system(5), module.balanced_truncation
    bad = system.lam[3, 0]

    def stubborn(part, rank, *rest):
        if rank > 4 and (part.lam == bad).any():
            raise TruncationError("not at this rank")
        return original(part, rank, *rest)

    monkeypatch.setattr(module, "balanced_truncation", stubborn)
    truncation = balanced_truncation_of_each(system, 6)
    assert truncation.active.sum(-1).tolist() == [6, 6, 6, 4, 6]
    monkeypatch.setattr(module, "_NEIGHBOURS", 1)
    with pytest.raises(TruncationError, match="not at this rank"):
        balanced_truncation_of_each(system, 6)


def test_a_response_of_zero_is_refused() -> None:
    system = random_system(2)
    with pytest.raises(TruncationError, match="response of zero"):
        balanced_truncation_of_each(DiagonalLTI(system.lam, system.B, 0 * system.C), 3)


def test_inert_states_are_checked() -> None:
    T = torch.eye(4, dtype=torch.float64)[:, :2]
    active = torch.tensor([True, False])
    zeroed = T * active
    assert Truncation(T=zeroed, W=zeroed, active=active).state_size == 2
    with pytest.raises(TruncationError, match="not zero"):
        Truncation(T=T, W=zeroed, active=active)
    with pytest.raises(DimensionError, match="must be bool"):
        Truncation(T=zeroed, W=zeroed, active=active.long())
    with pytest.raises(TruncationError, match="differs from the identity"):
        Truncation(T=zeroed, W=zeroed)


@pytest.mark.parametrize(("inputs", "outputs"), [(80, 90), (1, 90), (2, 1)])
def test_a_coarse_decomposition_agrees_above_its_resolution(inputs: int, outputs: int) -> None:
    system = random_system(n=96, inputs=inputs, outputs=outputs)
    fine, coarse = system.hankel_decomposition(), system.hankel_decomposition(COARSE_RESOLUTION)
    assert coarse.resolution == COARSE_RESOLUTION
    difference = (fine.sigma - coarse.sigma).abs()
    assert difference.max() < 1e-6 * fine.sigma[0]
    resolved = fine.sigma > 1e-3 * fine.sigma[0]
    assert (difference[resolved] < 1e-8 * fine.sigma[resolved]).all()
    rank = min(20, int(coarse.usable_rank))
    reduced, _ = balanced_truncation(system, rank, decomposition=coarse)
    assert reduced.is_stable()
    omega = verification_frequencies(system, reduced)
    assert response_error(system, reduced, omega).max() <= error_bound(fine.sigma, rank) * (1 + 1e-6) + 1e-9


def test_a_rank_below_the_resolution_is_made_good() -> None:
    lam = torch.linspace(0.1, 0.95, 70, dtype=torch.float64)
    system = DiagonalLTI(lam, torch.ones(70, 1), torch.ones(1, 70))
    coarse = system.hankel_decomposition(COARSE_RESOLUTION)
    fine_rank = int((system.hankel_singular_values() > 1e-9 * coarse.sigma[0]).sum())
    assert fine_rank > int(coarse.usable_rank)
    reduced, _ = balanced_truncation(system, fine_rank, condition_limit=1e12)
    assert response_error(system, reduced, verification_frequencies(system)).max() < 1e-6 * coarse.sigma[0]


def test_small_systems_are_always_decomposed_to_rounding() -> None:
    assert random_system().hankel_decomposition(COARSE_RESOLUTION).resolution == 0


def measured_gramians(ranks: list[int], n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of pairs of Gramians, the state covariances of these ranks."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for rank in ranks]
    P = torch.stack([sample @ sample.mH for sample in samples])
    Q = torch.randn(len(ranks), n, 3 * n, generator=generator, dtype=torch.float64)
    return P, Q @ Q.mH


def test_gramians_that_carry_all_states_are_cut_as_by_balancing() -> None:
    decomposition = hankel_decomposition(*measured_gramians([9, 5, 9]))
    found, expected = balancing_truncation_of_each(decomposition, 5), balancing_truncation(decomposition, 5)
    scale = (expected.T / found.T).mean((1, 2), keepdim=True)
    assert found.active is None
    torch.testing.assert_close(found.T * scale, expected.T)
    torch.testing.assert_close(found.W / scale, expected.W)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e6])
def test_the_unit_of_a_gramian_does_not_show_in_the_matrices(unit: float) -> None:
    P, Q = measured_gramians([9, 2, 9])
    expected = balancing_truncation_of_each(hankel_decomposition(P, Q), 4)
    found = balancing_truncation_of_each(hankel_decomposition(P, unit * Q), 4)
    sizes = [torch.linalg.matrix_norm(M) for M in (found.T, found.W)]
    torch.testing.assert_close(*sizes)
    # Each column up to its sign.
    for one, other in ((found.T, expected.T), (found.W, expected.W)):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-6, atol=1e-9)


def test_gramians_of_low_rank_are_filled_with_inert_states() -> None:
    P, Q = measured_gramians([9, 2, 0])
    truncation = balancing_truncation_of_each(hankel_decomposition(P, Q), 4)
    assert truncation.active.sum(-1).tolist() == [4, 2, 0]
    # What is left of each is balanced: both Gramians are the leading Hankel singular values, times one number.
    sigma = hankel_decomposition(P, Q).sigma[:, :4] * truncation.active
    projected = [truncation.W.mT @ P @ truncation.W, truncation.T.mT @ Q @ truncation.T]
    scales = [(M.diagonal(dim1=1, dim2=2).sum(1) / sigma.sum(1).clamp_min(1e-300))[:, None, None] for M in projected]
    torch.testing.assert_close((scales[0] * scales[1])[:2], torch.ones_like(scales[0])[:2])
    for M, scale in zip(projected, scales):
        torch.testing.assert_close(M, scale * torch.diag_embed(sigma), rtol=1e-9, atol=1e-9)


def test_gramians_of_nothing_are_refused() -> None:
    with pytest.raises(TruncationError, match="no Hankel singular value"):
        balancing_truncation_of_each(hankel_decomposition(*measured_gramians([0, 0])), 4)
