"""Reconstruction of signals from some of them, against torch's own least squares."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import DimensionError
from hf_compressm.systems import reconstruction


def test_it_is_the_least_squares_solution_of_each_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    signals, kept = (torch.randn(3, 80, size, generator=generator, dtype=torch.float64) for size in (7, 4))
    expected = torch.linalg.lstsq(kept, signals).solution.mT
    torch.testing.assert_close(reconstruction(signals, kept), expected, rtol=1e-8, atol=1e-10)


def test_units_decide_nothing_and_twins_do_no_harm() -> None:
    z = torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = z @ torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = torch.cat([z * torch.tensor([1e-6, 1.0, 1e6]), z[:, :1], torch.zeros(60, 1)], dim=-1)
    T = reconstruction(x, kept)
    assert T.isfinite().all()
    torch.testing.assert_close(kept @ T.mT, x, rtol=1e-6, atol=1e-6)


def test_other_samples_are_refused() -> None:
    with pytest.raises(DimensionError, match=r"signals have shape \(5, 3\) and kept ones \(4, 2\)"):
        reconstruction(torch.zeros(5, 3), torch.zeros(4, 2))
