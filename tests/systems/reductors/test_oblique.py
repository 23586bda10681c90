"""The oblique form of a delta rule and the eigenvalues of its steps."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import DimensionError, NotFiniteError, TruncationError
from hf_compressm.systems import Truncation, erased_shares, interpolation_residual, oblique_truncation

from .test_orthonormal import data_of, delta_rule, gramians, measured


def oblique(size: int, r: int, seed: int) -> Truncation:
    generator = torch.Generator().manual_seed(seed)
    T, W = (torch.randn(size, r, generator=generator, dtype=torch.float64) for _ in range(2))
    return Truncation(T=T, W=W @ torch.linalg.inv(W.mT @ T).mT)


def test_a_share_is_one_minus_the_eigenvalue_of_the_step() -> None:
    truncation = oblique(6, 3, 0)
    keys, beta = torch.randn(20, 6, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    shares = erased_shares(truncation, keys * beta.sqrt()[:, None])
    for k, b, share in zip(keys, beta, shares):
        step = torch.eye(3, dtype=torch.float64) - b * torch.outer(truncation.W.mT @ k, truncation.T.mT @ k)
        eigenvalues = torch.linalg.eigvals(step)
        assert (eigenvalues - (1 - share)).abs().min() < 1e-10
        assert (eigenvalues - 1).abs().sort().values[:2].max() < 1e-10


def test_a_batch_has_keys_of_its_own() -> None:
    P, Q = gramians(6, batch=(2,))
    keys = torch.randn(2, 9, 6) * 0.02
    truncation = oblique_truncation(P, Q, 3, keys)
    shares = erased_shares(truncation, keys)
    assert shares.shape == (2, 9)
    for i in range(2):
        alone = Truncation(T=truncation.T[i], W=truncation.W[i])
        torch.testing.assert_close(shares[i], erased_shares(alone, keys[i]))


def test_it_reaches_the_least_lost_energy() -> None:
    P, Q = gramians(8, decades=3)
    sigma = torch.linalg.svdvals(torch.linalg.cholesky(Q).mT @ torch.linalg.cholesky(P))
    share = interpolation_residual(P, Q, oblique_truncation(P, Q, 3, torch.zeros(1, 8)))
    assert share == pytest.approx(float(sigma[3:].square().sum() / sigma.square().sum()), rel=1e-6)


def test_keys_whose_steps_would_grow_are_refused() -> None:
    P, Q = gramians(8, 4, decades=6)
    truncation = oblique_truncation(P, Q, 3, torch.zeros(1, 8))
    projector = truncation.T @ truncation.W.mT
    values, vectors = torch.linalg.eigh((projector + projector.mT) / 2)
    assert values[0] < -0.1  # an oblique projector always has a key whose share is negative
    with pytest.raises(TruncationError, match=r"eigenvalue from .* to [12]\.[1-9]"):
        oblique_truncation(P, Q, 3, vectors[:, :1].mT)
    with pytest.raises(TruncationError, match="orthonormal"):
        oblique_truncation(P, Q, 3, 3 * vectors[:, -1:].mT)


def test_keys_of_another_size_or_not_finite_are_refused() -> None:
    P, Q = gramians(8)
    with pytest.raises(DimensionError, match="samples, 8"):
        oblique_truncation(P, Q, 3, torch.zeros(2, 7))
    with pytest.raises(NotFiniteError, match="keys"):
        oblique_truncation(P, Q, 3, torch.full((1, 8), torch.nan))


def test_on_data_it_is_as_good_as_its_energy_says() -> None:
    given = data_of(16, 4, 0, tail=0.15)
    P, Q = measured(*given)
    full, _ = delta_rule(*given)
    cut, _ = delta_rule(*given, oblique_truncation(P, Q, 6, given[1] * given[4].sqrt()[:, None]))
    assert (cut - full).norm() <= 0.6 * full.norm()
