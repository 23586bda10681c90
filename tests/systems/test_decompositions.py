"""Decompositions run in one thread, and leave the number of threads as it was."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.systems import _decompositions, hankel_decomposition


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_matrix_is_decomposed_in_one_thread_and_a_large_one_in_all(two_threads, monkeypatch) -> None:
    seen = []
    count = _decompositions._in_one_thread(lambda matrix: seen.append(torch.get_num_threads()))
    count(torch.zeros(3, 8, 8))
    monkeypatch.setattr(_decompositions, "_LARGE", 8)
    count(torch.zeros(3, 8, 8))
    assert seen == [1, 2] and torch.get_num_threads() == 2


def test_the_number_of_threads_is_put_back_after_an_error(two_threads) -> None:
    with pytest.raises(RuntimeError):
        _decompositions.eigh(torch.zeros(3, 4))
    assert torch.get_num_threads() == 2


def test_spectra_are_the_same(two_threads) -> None:
    samples = torch.randn(2, 20, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P, Q = samples @ samples.mT
    expected = torch.linalg.eigvals(P @ Q).real.sqrt().sort(descending=True).values
    torch.testing.assert_close(hankel_decomposition(P, Q).sigma, expected)
    assert torch.get_num_threads() == 2
