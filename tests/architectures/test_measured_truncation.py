"""A measured truncation is a truncation that takes mean squares along."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.architectures import MeasuredTruncation
from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import Truncation, selection_truncation


def test_everything_of_the_truncation_stays_and_moves_between_devices_with_the_squares() -> None:
    truncation = selection_truncation(torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0]]), r=2)
    measured = MeasuredTruncation.of(truncation, torch.rand(2, 2, 3))
    assert measured.fingerprint() == truncation.fingerprint()
    assert measured.is_selection and torch.equal(measured.indices, truncation.indices)
    moved = measured.to("cpu")
    assert isinstance(moved, MeasuredTruncation) and torch.equal(moved.squares, measured.squares)


def test_it_refuses_what_does_not_fit() -> None:
    truncation = Truncation.from_indices([0, 2], full_size=3)
    with pytest.raises(DimensionError, match=r"squares have shape \(3,\); they must be \(2, 3\)"):
        MeasuredTruncation.of(truncation, torch.rand(3))
    with pytest.raises(TruncationError, match="identity"):
        MeasuredTruncation(T=2 * truncation.T, W=truncation.W)
