"""Interpolative truncation: exact where it can be, close to the best subset, indifferent to units, never NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    balancing_truncation,
    diagonal_hankel_scores,
    gramian_factor,
    hankel_decomposition,
    hankel_singular_values,
    interpolation_residual,
    interpolative_truncation,
    project,
    selection_truncation,
)


def gramians(N: int, seed: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> tuple:
    """Correlated states and adjoints with a decaying spectrum, as measured ones have."""
    generator = torch.Generator().manual_seed(seed)

    def gramian(decay: float) -> torch.Tensor:
        mixing = torch.randn(N, rank or N, generator=generator, dtype=dtype)
        samples = mixing * decay ** torch.arange(rank or N)
        return samples @ samples.mH

    return gramian(0.7), gramian(0.8)


def lost_energy(P: np.ndarray, Q: np.ndarray, kept: list) -> float:
    """`trace(Q R)` with `R = P - P_S P_SS^-1 P_S^T`, straight from the definition."""
    R = P - P[:, kept] @ np.linalg.solve(P[np.ix_(kept, kept)], P[kept].conj())
    return float(np.trace(Q @ R).real / np.trace(Q @ P).real)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("seed", range(5))
def test_redundant_states_are_rebuilt_exactly(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    independent = torch.randn(4, 200, generator=generator, dtype=dtype)
    mixing = torch.randn(12, 4, generator=generator, dtype=dtype)
    states = mixing @ independent
    Q = torch.randn(12, 12, generator=generator, dtype=dtype)
    truncation = interpolative_truncation(states @ states.mH, Q @ Q.mH, 4)
    rebuilt = truncation.T @ states[truncation.indices]
    assert (rebuilt - states).abs().max() < 1e-8 * states.abs().max()
    assert interpolation_residual(states @ states.mH, Q @ Q.mH, truncation) < 1e-16


def test_the_kept_states_of_a_system_keep_their_poles_and_the_readout_takes_the_rest() -> None:
    lam = torch.tensor([0.9, 0.9, 0.5, 0.5, -0.2], dtype=torch.float64)
    system = DiagonalLTI(
        lam, torch.tensor([[1.0], [2.0], [1.0], [-3.0], [1.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    )
    P, Q = system.controllability_gramian(), system.observability_gramian()
    reduced = project(system, interpolative_truncation(P, Q, 3))
    assert sorted(reduced.lam.real.tolist()) == [-0.2, 0.5, 0.9]
    assert torch.allclose(reduced.impulse_response(50), system.impulse_response(50), atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_definition_of_T(seed: int) -> None:
    P, Q = gramians(10, seed)
    truncation = interpolative_truncation(P, Q, 4, ridge=1e-14)
    kept = truncation.indices
    expected = P[:, kept] @ torch.linalg.inv(P[kept][:, kept])
    assert torch.allclose(truncation.T, expected, atol=1e-6)
    assert torch.equal(truncation.T[kept], torch.eye(4, dtype=torch.float64))
    assert truncation.indices.tolist() == sorted(set(kept.tolist()))


@pytest.mark.parametrize("seed", range(8))
def test_each_choice_is_the_greedy_one(seed: int) -> None:
    """Against the definition: the state whose addition leaves the least `trace(Q R)`."""
    P, Q = gramians(9, seed)
    kept: list = []
    for r in range(1, 6):
        losses = {k: lost_energy(P.numpy(), Q.numpy(), [*kept, k]) for k in range(9) if k not in kept}
        kept.append(min(losses, key=losses.get))
        assert interpolative_truncation(P, Q, r).indices.tolist() == sorted(kept)


@pytest.mark.parametrize("seed", range(10))
def test_close_to_the_best_subset_and_never_worse_than_selection(seed: int) -> None:
    P, Q = gramians(9, seed)
    scores = diagonal_hankel_scores(P, Q)
    sigma = hankel_singular_values(P, Q)
    for r in (1, 2, 3, 5):
        truncation = interpolative_truncation(P, Q, r)
        loss = interpolation_residual(P, Q, truncation)
        assert loss == pytest.approx(lost_energy(P.numpy(), Q.numpy(), truncation.indices.tolist()), rel=1e-4)
        best = min(lost_energy(P.numpy(), Q.numpy(), list(subset)) for subset in itertools.combinations(range(9), r))
        assert best * (1 - 1e-6) <= loss <= 3 * best
        assert loss <= interpolation_residual(P, Q, selection_truncation(scores, r)) + 1e-12
        # Eckart and Young: no truncation loses less than the tail, and balanced coordinates lose just that.
        tail = (sigma[r:].square().sum() / sigma.square().sum()).item()
        assert loss >= tail * (1 - 1e-9)
        balanced = balancing_truncation(hankel_decomposition(P, Q), r)
        assert interpolation_residual(P, Q, balanced) == pytest.approx(tail, rel=1e-5)


def test_more_states_lose_less() -> None:
    P, Q = gramians(40, seed=0)
    losses = [interpolation_residual(P, Q, interpolative_truncation(P, Q, r)) for r in range(1, 41)]
    assert all(later <= earlier * (1 + 1e-6) + 1e-14 for earlier, later in itertools.pairwise(losses))
    assert losses[0] < 1
    assert losses[-1] == 0


@pytest.mark.parametrize("decades", [1, 6, 12])
def test_units_of_the_states_do_not_matter(decades: int) -> None:
    P, Q = gramians(16, seed=3)
    units = 10 ** torch.linspace(-decades, decades, 16, dtype=torch.float64)[torch.randperm(16)]
    scaled = interpolative_truncation(P * units[:, None] * units, Q / units[:, None] / units, 6)
    plain = interpolative_truncation(P, Q, 6)
    assert torch.equal(scaled.indices, plain.indices)
    assert torch.allclose(scaled.T * units[plain.indices] / units[:, None], plain.T, atol=1e-7)


def test_the_output_decides_not_the_variance() -> None:
    P, Q = torch.diag(torch.tensor([100.0, 1.0])), torch.diag(torch.tensor([1e-6, 1.0]))
    assert interpolative_truncation(P, Q, 1).indices.tolist() == [1]


def test_a_permutation_of_the_states_permutes_the_choice() -> None:
    P, Q = gramians(12, seed=4)
    order = torch.randperm(12)
    kept = interpolative_truncation(P, Q, 5).indices
    permuted = interpolative_truncation(P[order][:, order], Q[order][:, order], 5)
    assert sorted(order[permuted.indices].tolist()) == kept.tolist()


@pytest.mark.parametrize("r", [1, 3, 6, 7, 10])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rank_deficient_gramians(rank: int, r: int) -> None:
    P, _ = gramians(10, seed=rank, rank=rank)
    _, Q = gramians(10, seed=rank, rank=2)
    for pair in [(P, Q), (P, torch.eye(10)), (torch.eye(10), Q)]:
        truncation = interpolative_truncation(*pair, r)
        assert len(set(truncation.indices.tolist())) == r
        assert truncation.T.abs().max() < 1e4
    if r >= rank:
        assert interpolation_residual(P, Q, interpolative_truncation(P, Q, r)) < 1e-9


def test_nothing_to_go_by() -> None:
    """No states, no observability, or neither: places are filled by score, then by index, and T rebuilds nothing."""
    zero, P = torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0]))
    assert interpolative_truncation(zero, zero, 2).indices.tolist() == [0, 1]
    assert interpolative_truncation(zero, P, 2).indices.tolist() == [0, 1]
    assert interpolative_truncation(P, zero, 2).indices.tolist() == [0, 1]
    assert interpolative_truncation(zero, P, 2).is_selection
    assert interpolation_residual(zero, P, interpolative_truncation(zero, P, 2)) == 0.0


def test_places_left_over_go_to_the_highest_scores() -> None:
    states = torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    P, Q = states @ states.T, torch.diag(torch.tensor([1.0, 1.0, 1.0, 9.0]))
    assert interpolative_truncation(P, Q, 1).indices.tolist() == [0]  # all three are the same state
    assert interpolative_truncation(P, Q, 2).indices.tolist() == [0, 2]
    assert interpolative_truncation(P, Q, 3).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_no_reason_to_keep_a_state(seed: int) -> None:
    """Two directions in ten states: after two choices, what is left of the others is rounding, and scores decide."""
    P, _ = gramians(10, seed, rank=2)
    _, Q = gramians(10, seed)
    first = interpolative_truncation(P, Q, 2).indices.tolist()
    scores = diagonal_hankel_scores(P, Q)
    scores[first] = -1
    expected = first + scores.argsort(descending=True)[:4].tolist()
    assert interpolative_truncation(P, Q, 6).indices.tolist() == sorted(expected)


def test_a_small_difference_that_the_output_sees_is_kept() -> None:
    """States 0 and 1 agree to 1e-4, and the output reads their difference much more strongly than anything else."""
    mixing = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1e-4, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    readout = torch.tensor([[1e5, -1e5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.1]], dtype=torch.float64)
    truncation = interpolative_truncation(mixing @ mixing.T, readout.T @ readout, 2)
    assert truncation.indices.tolist() == [0, 1]


def test_dead_states_are_kept_last() -> None:
    P, Q = gramians(8, seed=0)
    alive = torch.ones(8, dtype=torch.float64)
    alive[[1, 4]] = 0
    truncation = interpolative_truncation(P * alive[:, None] * alive, Q, 6)
    assert truncation.indices.tolist() == [0, 2, 3, 5, 6, 7]
    assert truncation.T[[1, 4]].abs().max() == 0


def test_the_ridge_bounds_T() -> None:
    lam = (1 - torch.logspace(-3, -0.1, 48, dtype=torch.float64)).to(torch.complex128)
    generator = torch.Generator().manual_seed(0)
    system = DiagonalLTI(lam, torch.ones(48, 1), torch.randn(2, 48, generator=generator, dtype=torch.float64))
    P, Q = system.controllability_gramian().real, system.observability_gramian().real
    size = P.diagonal().sqrt()

    def relative(truncation: Truncation) -> float:
        return (truncation.T / size[:, None] * size[truncation.indices]).abs().max().item()

    loose, tight = (interpolative_truncation(P, Q, 16, ridge=ridge) for ridge in (1e-13, 1e-8))
    assert relative(tight) < relative(loose)
    assert interpolation_residual(P, Q, tight) < 1e-6
    rounded = Truncation.from_indices(tight.indices, 48, T=tight.T.bfloat16().double())
    assert interpolation_residual(P, Q, rounded) < 1e-4


def test_any_dtype() -> None:
    P, Q = gramians(6, seed=0)
    expected = interpolative_truncation(P, Q, 3)
    found = interpolative_truncation(P.float(), Q.float(), 3)
    assert found.T.dtype == torch.float64
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.T, expected.T, atol=1e-4)
    assert interpolative_truncation(P, Q.to(torch.complex64), 3).T.dtype == torch.complex128


def test_large_states_are_quick() -> None:
    P, Q = gramians(512, seed=0)
    truncation = interpolative_truncation(P, Q, 256)
    assert truncation.T.shape == (512, 256)
    assert interpolation_residual(P, Q, truncation) < 1e-8


def test_residual_of_a_batch() -> None:
    pairs = [gramians(5, seed) for seed in (0, 1)]
    P, Q = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
    truncation = Truncation.from_indices([0, 2], full_size=5)
    expected = [interpolation_residual(*pair, truncation) for pair in pairs]
    assert interpolation_residual(P, Q, truncation).tolist() == pytest.approx(expected)


def test_residual_of_a_selection_by_hand() -> None:
    """Two states that cancel at the output: keeping one of them alone is worse than keeping nothing."""
    P = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    Q = torch.tensor([[1.0, -0.9], [-0.9, 1.0]])
    assert interpolation_residual(P, Q, Truncation.from_indices([0], 2)) == pytest.approx(1.0 / 0.2)
    assert interpolation_residual(P, Q, interpolative_truncation(P, Q, 1)) == pytest.approx(0, abs=1e-12)


def test_every_pair_of_a_batch_is_cut_for_itself() -> None:
    pairs = [gramians(7, seed) for seed in range(6)]
    P, Q = (torch.stack(matrices).unflatten(0, (2, 3)) for matrices in zip(*pairs))
    batch = interpolative_truncation(P, Q, 3)
    assert batch.T.shape == (2, 3, 7, 3) and batch.indices.shape == (2, 3, 3)
    for number, pair in enumerate(pairs):
        single = interpolative_truncation(*pair, 3)
        at = divmod(number, 3)
        assert torch.equal(batch.indices[at], single.indices)
        # Equal but for rounding: a linear algebra library may take another path for another alignment.
        torch.testing.assert_close(batch.T[at], single.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(batch.shares[at], single.shares, rtol=1e-9, atol=1e-12)


class TestArguments:
    def test_rank(self) -> None:
        for r in (0, 5):
            with pytest.raises(DimensionError, match=f"r is {r}; allowed are 1 to 4"):
                interpolative_truncation(torch.eye(4), torch.eye(4), r)

    def test_shapes(self) -> None:
        with pytest.raises(DimensionError, match=r"must be \(\.\.\., N, N\)"):
            interpolative_truncation(torch.ones(3), torch.ones(3), 1)
        with pytest.raises(DimensionError, match="both must be the same"):
            interpolative_truncation(torch.eye(3), torch.eye(4), 1)
        with pytest.raises(DimensionError, match="for 2 states and the Gramians for 3"):
            interpolation_residual(torch.eye(3), torch.eye(3), Truncation.from_indices([0], 2))

    @pytest.mark.parametrize("ridge", [0.0, -1e-8, float("nan")])
    def test_ridge(self, ridge: float) -> None:
        with pytest.raises(ConfigurationError, match="ridge is"):
            interpolative_truncation(torch.eye(3), torch.eye(3), 1, ridge=ridge)

    def test_matrices_that_are_no_gramians(self) -> None:
        eye = torch.eye(2)
        with pytest.raises(NotFiniteError, match="P has"):
            interpolative_truncation(eye * float("nan"), eye, 1)
        with pytest.raises(ConfigurationError, match="Q is indefinite"):
            interpolative_truncation(eye, -eye, 1)
        with pytest.raises(ConfigurationError, match="P is not Hermitian"):
            interpolative_truncation(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), eye, 1)


def test_known_factors_give_the_same_truncation_and_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    P, Q = roots @ roots.mT
    factors = gramian_factor(P), gramian_factor(Q)
    found, expected = interpolative_truncation(P, Q, 4, factors=factors), interpolative_truncation(P, Q, 4)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.T, expected.T)
    single = interpolative_truncation(P[1], Q[1], 4, factors=(factors[0][1], factors[1][1]))
    torch.testing.assert_close(single.T, expected.T[1], atol=1e-12, rtol=1e-12)
    residuals = (interpolation_residual(P, Q, expected, known) for known in (factors, None))
    assert torch.equal(*residuals)
