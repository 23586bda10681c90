"""The rank rule and its edge cases, the error bound, and Spearman's correlation against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError
from hf_compressm.systems import energy_rank, error_bound, joint_energy_ranks, rank_correlation


class TestEnergyRank:
    @pytest.mark.parametrize(
        ("sigma", "tolerance", "rank"),
        [
            ([4.0, 3.0, 2.0, 1.0], 0.10, 3),  # exactly the share that may go
            ([4.0, 3.0, 2.0, 1.0], 0.0999, 4),
            ([4.0, 3.0, 2.0, 1.0], 0.30, 2),
            ([4.0, 3.0, 2.0, 1.0], 0.2999, 3),
            ([4.0, 3.0, 2.0, 1.0], 0.60, 1),
            ([4.0, 3.0, 2.0, 1.0], 0.99, 1),
            ([1.0, 0.0, 0.0], 0.01, 1),
            ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
            ([5.0], 0.5, 1),
        ],
    )
    def test_by_hand(self, sigma: list, tolerance: float, rank: int) -> None:
        found = energy_rank(torch.tensor(sigma, dtype=torch.float64), tolerance)
        assert found == rank
        assert isinstance(found, int)

    def test_the_sum_is_over_sigma_not_its_square(self) -> None:
        # Of the squares, the first holds 99%; of the values themselves, 91%.
        assert energy_rank(torch.tensor([10.0, 1.0]), 0.05) == 2

    def test_is_the_definition(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(300):
            size = rng.integers(1, 40)
            sigma = np.sort(10 ** rng.uniform(-6, 0, size))[::-1].copy()
            tolerance = 10 ** rng.uniform(-6, -0.01)
            enough = [r for r in range(1, size + 1) if sigma[:r].sum() >= (1 - tolerance) * sigma.sum()]
            assert energy_rank(torch.from_numpy(sigma), tolerance) == min(enough)

    def test_a_larger_tolerance_never_keeps_more(self) -> None:
        sigma = torch.logspace(0, -5, 30)
        ranks = [energy_rank(sigma, tolerance) for tolerance in np.logspace(-9, -0.01, 60)]
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[0] == 30
        assert ranks[-1] == 1

    def test_an_unreachable_tolerance_keeps_the_full_order(self) -> None:
        assert energy_rank(torch.ones(7), 1e-3) == 7
        assert energy_rank(torch.tensor([1.0, 1e-3]), 1e-12) == 2

    def test_a_tolerance_below_rounding_still_counts(self) -> None:
        sigma = torch.tensor([1.0, 1e-18, 1e-22], dtype=torch.float64)
        assert energy_rank(sigma, 1e-20) == 2
        assert energy_rank(sigma, 1e-17) == 1
        together = torch.tensor([1.0, 6e-19, 6e-19], dtype=torch.float64)
        assert energy_rank(together, 1e-18) == 2

    def test_a_zero_spectrum_keeps_the_full_order(self) -> None:
        assert energy_rank(torch.zeros(6), 0.01) == 6

    def test_a_batch(self) -> None:
        sigma = torch.tensor(
            [[[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]]
        )
        ranks = energy_rank(sigma, 0.1)
        assert ranks.dtype == torch.int64
        assert ranks.tolist() == [[3, 4], [1, 4]]

    @pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e308])
    def test_extreme_magnitudes(self, size: float) -> None:
        assert energy_rank(size * torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64), 0.06) == 2

    @pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, 1.5, float("nan")])
    def test_tolerance_outside_the_open_interval(self, tolerance: float) -> None:
        with pytest.raises(ConfigurationError, match=r"tolerance is .* strictly between 0 and 1"):
            energy_rank(torch.ones(3), tolerance)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad: float) -> None:
        with pytest.raises(NotFiniteError, match="sigma has 1 of 3"):
            energy_rank(torch.tensor([2.0, 1.0, bad]), 0.1)

    @pytest.mark.parametrize("sigma", [[1.0, 2.0], [2.0, 1.0, -1.0]])
    def test_not_a_spectrum(self, sigma: list) -> None:
        with pytest.raises(ConfigurationError, match="negative or not descending"):
            energy_rank(torch.tensor(sigma), 0.1)

    def test_one_negative_value(self) -> None:
        with pytest.raises(ConfigurationError, match="smallest entry is -1"):
            energy_rank(torch.tensor([-1.0]), 0.1)

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
    def test_no_spectrum(self, shape: tuple) -> None:
        with pytest.raises(DimensionError, match="sigma has shape"):
            energy_rank(torch.zeros(shape), 0.1)


class TestErrorBound:
    def test_by_hand(self) -> None:
        sigma = torch.tensor([4.0, 3.0, 2.0, 1.0])
        assert [error_bound(sigma, r) for r in (1, 2, 3, 4)] == [12.0, 6.0, 2.0, 0.0]
        assert isinstance(error_bound(sigma, 2), float)

    def test_a_batch(self) -> None:
        assert error_bound(torch.tensor([[2.0, 1.0], [4.0, 4.0]]), 1).tolist() == [2.0, 8.0]

    @pytest.mark.parametrize("r", [0, 5, -1])
    def test_rank_out_of_range(self, r: int) -> None:
        with pytest.raises(DimensionError, match=f"r is {r}; allowed are 1 to 4"):
            error_bound(torch.ones(4), r)

    def test_rank_is_not_an_integer(self) -> None:
        with pytest.raises(DimensionError, match=r"r must be an integer, got 1\.5 of type float"):
            error_bound(torch.ones(4), 1.5)

    def test_not_a_spectrum(self) -> None:
        with pytest.raises(ConfigurationError):
            error_bound(torch.tensor([1.0, 2.0]), 1)


class TestRankCorrelation:
    @pytest.mark.parametrize("levels", [3, 10, 10**6])
    def test_agrees_with_scipy(self, levels: int) -> None:
        rng = np.random.default_rng(levels)
        for _ in range(30):
            a, b = rng.integers(0, levels, (2, 12)).astype(float)
            expected = scipy.stats.spearmanr(a, b).statistic
            assert rank_correlation(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-14)

    def test_only_the_order_matters(self) -> None:
        a = torch.tensor([1.0, 5.0, 2.0, 9.0])
        assert rank_correlation(a, a.exp()) == 1.0
        assert rank_correlation(a, -a) == -1.0

    def test_vectors_that_rank_nothing(self) -> None:
        same, ranked = torch.ones(4), torch.arange(4.0)
        assert rank_correlation(same, 2 * same) == 1.0
        assert rank_correlation(same, ranked) == 0.0
        assert rank_correlation(torch.ones(1), torch.zeros(1)) == 1.0

    def test_a_batch(self) -> None:
        a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
        b = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
        assert rank_correlation(a, b).tolist() == [1.0, -1.0]

    def test_arguments(self) -> None:
        with pytest.raises(DimensionError, match=r"shapes \(3,\) and \(4,\)"):
            rank_correlation(torch.ones(3), torch.ones(4))
        with pytest.raises(DimensionError, match="N >= 1"):
            rank_correlation(torch.ones(0), torch.ones(0))
        with pytest.raises(NotFiniteError, match="scores_b"):
            rank_correlation(torch.ones(2), torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e307])
def test_joint_ranks_do_not_depend_on_the_scale(scale: float) -> None:
    spectra = [torch.tensor([4.0, 2.0, 1.0]).double() * scale, torch.tensor([3.0, 1.0]).double() * scale]
    assert joint_energy_ranks(spectra, 0.2) == [2, 1]
