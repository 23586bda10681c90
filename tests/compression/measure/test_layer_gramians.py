"""Empirical Gramians of a layer whose state falls into groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.compression.measure.layer_gramians import EmpiricalGramians
from hf_compressm.systems import Truncation, greedy_selection_truncation, hankel_singular_values

N, GROUPS = 6, 3


def grouped_gramians(groups: int = GROUPS) -> EmpiricalGramians:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(2, groups, N, 4 * N, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, 10.0, 0.1]).double()[:groups, None, None] * 0.6 ** torch.arange(N)[:, None]
    P, Q = scales * factors @ (scales * factors).mT
    energy = torch.rand(groups, N, generator=generator, dtype=torch.float64)
    C = torch.randn(groups, N, 2 * N, generator=generator, dtype=torch.float64)
    return EmpiricalGramians(P, Q, energy, C @ C.mT)


def of_group(gramians: EmpiricalGramians, group: int) -> EmpiricalGramians:
    return EmpiricalGramians(*(getattr(gramians, name)[group] for name in ("P", "Q", "readout_energy", "R")))


def test_the_spectrum_is_the_sum_of_the_groups_spectra() -> None:
    gramians = grouped_gramians()
    singles = [hankel_singular_values(gramians.P[group], gramians.Q[group]) for group in range(GROUPS)]
    torch.testing.assert_close(gramians.hankel_singular_values(), sum(singles))


@pytest.mark.parametrize(
    "settings",
    [
        {"reductor": "balanced"},
        {"reductor": "interpolative"},
        {"reductor": "selection", "selection_score": "hankel"},
        {"reductor": "selection", "selection_score": "readout_energy"},
        {"reductor": "selection", "selection_score": "greedy"},
    ],
    ids=str,
)
def test_groups_are_cut_each_for_itself(settings: dict) -> None:
    gramians, config = grouped_gramians(), CompreSSMConfig(**settings)
    truncation = gramians.truncate(2, config.reductor, config)
    assert truncation.T.shape == (GROUPS, N, 2)
    lost = total = 0.0
    for group in range(GROUPS):
        single = of_group(gramians, group)
        expected = single.truncate(2, config.reductor, config)
        torch.testing.assert_close(truncation.T[group], expected.T)
        torch.testing.assert_close(gramians.scores_after(truncation)[group], single.scores_after(expected))
        energy = float((single.P @ single.Q).trace())
        lost, total = lost + single.lost_energy(expected) * energy, total + energy
    assert gramians.lost_energy(truncation) == pytest.approx(lost / total)


def test_balanced_truncation_loses_what_the_spectrum_says_and_keeps_the_leading_scores() -> None:
    gramians = grouped_gramians(groups=1)
    sigma = gramians.hankel_singular_values()
    truncation = gramians.truncate(3, "balanced", CompreSSMConfig())
    share = float(sigma[3:].square().sum() / sigma.square().sum())
    assert gramians.lost_energy(truncation) == pytest.approx(share, rel=1e-6)
    scores = gramians.scores_after(truncation)[0]
    torch.testing.assert_close(scores, sigma[:3])


def test_scores_bear_a_readout_that_is_large_where_the_loss_sees_nothing() -> None:
    """Rounding leaves `T^T Q T` far from Hermitian there, next to what the loss does see."""
    gramians = grouped_gramians(groups=1)
    seen = torch.zeros(N, dtype=torch.float64)
    seen[0], seen[1] = 1.0, 0.3
    rotation = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    blind = replace(gramians, Q=(rotation * seen @ rotation.mT)[None])
    T = (rotation[:, :2] + 1e6 * rotation[:, 3:5])[None]
    W = rotation[:, :2][None]
    product = T.mT @ blind.Q @ T
    assert (product - product.mT).abs().max() > 1e-8 * product.abs().max()
    scores = blind.scores_after(Truncation(T=T, W=W))
    energy = (W.mT @ gramians.P @ W).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(scores, (energy * seen[:2]).sqrt(), rtol=1e-2, atol=0)


def test_greedy_selection_folds_nothing() -> None:
    gramians = grouped_gramians()
    config = CompreSSMConfig(reductor="selection", selection_score="greedy")
    truncation = gramians.truncate(3, "selection", config)
    assert truncation.is_selection
    assert torch.equal(truncation.indices, greedy_selection_truncation(gramians.P, gramians.R, 3).indices)
    # A random selection is an ablation of every score.
    ablation = CompreSSMConfig(reductor="selection", selection_score="greedy", selection_rule="random")
    draws = {tuple(gramians.truncate(3, "selection", ablation, seed).indices.flatten().tolist()) for seed in range(5)}
    assert len(draws) > 1


def test_the_smallest_states_are_those_of_the_hankel_scores() -> None:
    """A greedy choice names the states to keep and gives the others no order."""
    gramians = grouped_gramians()
    choices = [
        gramians.truncate(3, "selection", CompreSSMConfig(selection_score=score, selection_rule="smallest")).indices
        for score in ("greedy", "hankel")
    ]
    assert torch.equal(*choices)
