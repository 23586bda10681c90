"""Selection rules and the diagonal Hankel score."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError
from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    diagonal_hankel_scores,
    greedy_selection_truncation,
    interpolation_residual,
    selection_truncation,
)

from ..oracles import random_system

SCORES = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])


@pytest.mark.parametrize(
    ("rule", "r", "kept"),
    [
        ("largest", 1, [5]),
        ("largest", 3, [2, 4, 5]),
        ("largest", 5, [0, 1, 2, 4, 5]),  # of the tied 1 and 3, the lower index
        ("largest", 6, [0, 1, 2, 3, 4, 5]),
        ("smallest", 1, [1]),
        ("smallest", 3, [0, 1, 3]),
    ],
)
def test_by_hand(rule: str, r: int, kept: list) -> None:
    truncation = selection_truncation(SCORES, r, rule)
    assert truncation.indices.tolist() == kept
    assert truncation.is_selection
    assert truncation.T.dtype == torch.float64


def test_ties_go_to_the_lowest_index() -> None:
    assert selection_truncation(torch.ones(300), 4).indices.tolist() == [0, 1, 2, 3]
    assert selection_truncation(torch.ones(300), 4, "smallest").indices.tolist() == [0, 1, 2, 3]


def test_a_batch() -> None:
    truncation = selection_truncation(torch.stack([SCORES, -SCORES]), 2)
    assert truncation.indices.tolist() == [[4, 5], [1, 3]]
    assert truncation.T.shape == (2, 6, 2)


def test_random_follows_its_generator_not_the_scores() -> None:
    def chosen(seed: int, scores: torch.Tensor) -> list:
        generator = torch.Generator().manual_seed(seed)
        return selection_truncation(scores, 10, "random", generator).indices.tolist()

    assert chosen(0, torch.arange(40.0)) == chosen(0, torch.zeros(40))
    assert len({tuple(chosen(seed, torch.zeros(40))) for seed in range(20)}) > 15
    counts = torch.zeros(40)
    for seed in range(200):
        counts[chosen(seed, torch.zeros(40))] += 1
    assert 20 < counts.min() < counts.max() < 90  # every state, about 50 times


def test_scores_are_singular_values_of_single_states() -> None:
    system = random_system("mimo", 0)
    scores = diagonal_hankel_scores(system.controllability_gramian(), system.observability_gramian())
    for i in range(system.order):
        alone = DiagonalLTI(system.lam[i : i + 1], system.B[i : i + 1], system.C[:, i : i + 1])
        assert scores[i].item() == pytest.approx(alone.hankel_singular_values().item(), rel=1e-12)


def test_scores_do_not_underflow_and_come_in_batches() -> None:
    tiny = torch.diag(torch.tensor([1e-200, 4.0], dtype=torch.float64)).expand(3, 2, 2)
    assert diagonal_hankel_scores(tiny, tiny)[1].tolist() == pytest.approx([1e-200, 4.0])
    assert diagonal_hankel_scores(tiny, tiny).shape == (3, 2)


def test_a_negative_variance_of_rounding_scores_zero() -> None:
    assert diagonal_hankel_scores(torch.diag(torch.tensor([-1e-20, 1.0])), torch.eye(2)).tolist() == [0.0, 1.0]


class TestArguments:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad: float) -> None:
        with pytest.raises(NotFiniteError, match="scores has 1 of 2"):
            selection_truncation(torch.tensor([1.0, bad]), 1)

    def test_rule(self) -> None:
        with pytest.raises(ConfigurationError, match="rule is 'best'; allowed are"):
            selection_truncation(SCORES, 2, "best")

    @pytest.mark.parametrize("r", [0, 7])
    def test_rank(self, r: int) -> None:
        with pytest.raises(DimensionError, match=f"r is {r}; allowed are 1 to 6"):
            selection_truncation(SCORES, r)

    @pytest.mark.parametrize("scores", [torch.tensor(1.0), torch.zeros(3, dtype=torch.complex64)])
    def test_scores(self, scores: torch.Tensor) -> None:
        with pytest.raises(DimensionError, match="scores have dtype"):
            selection_truncation(scores, 1)

    def test_gramians(self) -> None:
        with pytest.raises(DimensionError, match="P has shape"):
            diagonal_hankel_scores(torch.eye(2), torch.eye(3))
        with pytest.raises(ConfigurationError, match="Q is not Hermitian"):
            diagonal_hankel_scores(torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))


def measured(*batch: int, n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gramians of correlated states and adjoints."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(2, *batch, n, n, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(n)
    P, Q = samples @ samples.mT
    return P, Q


@pytest.mark.parametrize("seed", range(4))
def test_greedy_selection_is_close_to_the_best_subset(seed: int) -> None:
    P, Q = measured(seed=seed)
    for r in range(1, 7):
        found = interpolation_residual(P, Q, greedy_selection_truncation(P, Q, r))
        every = [interpolation_residual(P, Q, Truncation.from_indices(list(kept), 7))
                 for kept in itertools.combinations(range(7), r)]  # fmt: skip
        assert min(every) - 1e-12 <= found <= min(every) + 0.1


def test_greedy_selection_takes_the_cheapest_state_each_time() -> None:
    """The loss of a selection, measured by the residual, is what each step compares."""
    P, Q = measured(seed=5)
    kept = list(range(7))
    for r in range(6, 0, -1):
        losses = {
            n: interpolation_residual(P, Q, Truncation.from_indices([k for k in kept if k != n], 7)) for n in kept
        }
        kept.remove(min(losses, key=losses.get))
        assert greedy_selection_truncation(P, Q, r).indices.tolist() == kept


def test_greedy_selection_of_a_batch_and_in_other_units() -> None:
    P, Q = measured(2, 3)
    batch = greedy_selection_truncation(P, Q, 3)
    units = 10.0 ** torch.arange(-3, 4).double()
    for at in itertools.product(range(2), range(3)):
        assert torch.equal(batch.indices[at], greedy_selection_truncation(P[at], Q[at], 3).indices)
        scaled = greedy_selection_truncation(P[at] * units * units[:, None], Q[at] / units / units[:, None], 3)
        assert torch.equal(batch.indices[at], scaled.indices)
