"""Moments of complex parameters, one matrix for a layer or one for each channel."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.architectures import ModalMap
from hf_compressm.errors import DimensionError


@pytest.mark.parametrize("axis", [0, 1])
def test_complex_gradients_move_with_the_complex_matrix(axis: int) -> None:
    matrix = torch.randn(3, 5, dtype=torch.complex128)
    gradient = torch.randn((5, 7) if axis == 0 else (7, 5), dtype=torch.complex128)
    found = torch.view_as_complex(ModalMap(axis, matrix, has_pairs=True).first(torch.view_as_real(gradient)))
    torch.testing.assert_close(found, matrix @ gradient if axis == 0 else gradient @ matrix.T)


@pytest.mark.parametrize("axis", [0, 1])
def test_second_moments_move_with_squares_of_both_parts(axis: int) -> None:
    matrix = torch.randn(3, 5, dtype=torch.complex128)
    moment = torch.rand(*((5, 7) if axis == 0 else (7, 5)), 2)
    found = ModalMap(axis, matrix, has_pairs=True).second(moment)
    rows = moment.double().movedim(axis, 0)
    real, imag = matrix.real**2, matrix.imag**2
    expected_real = torch.tensordot(real, rows[..., 0], 1) + torch.tensordot(imag, rows[..., 1], 1)
    expected_imag = torch.tensordot(imag, rows[..., 0], 1) + torch.tensordot(real, rows[..., 1], 1)
    expected = torch.stack([expected_real, expected_imag], -1).movedim(0, axis)
    assert found.dtype == torch.float32 and (found >= 0).all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_each_channel_has_its_matrix() -> None:
    matrices = torch.randn(4, 3, 5, dtype=torch.complex128)
    gradient = torch.randn(4, 5, dtype=torch.complex128)
    found = torch.view_as_complex(ModalMap(1, matrices, has_pairs=True).first(torch.view_as_real(gradient)))
    torch.testing.assert_close(found, torch.stack([M @ g for M, g in zip(matrices, gradient)]))
    moment = torch.rand(4, 5, dtype=torch.float64)
    found = ModalMap(1, matrices.real).second(moment)
    torch.testing.assert_close(found, torch.stack([M.real.square() @ v for M, v in zip(matrices, moment)]))


def test_slices_pick_the_kept_entries_or_the_leading_ones() -> None:
    moment = torch.rand(4, 5, 2)
    matrices = torch.randn(4, 3, 5, dtype=torch.complex128)
    kept = torch.tensor([[0, 2, 4], [1, 2, 3], [0, 1, 2], [2, 3, 4]])
    sliced = ModalMap(1, matrices, kept, has_pairs=True).sliced()
    expected = torch.stack([row[index] for row, index in zip(moment, kept)])
    assert torch.equal(sliced.first(moment), expected)
    assert torch.equal(sliced.second(moment), expected)
    assert torch.equal(ModalMap(1, matrices[0], has_pairs=True).sliced().first(moment), moment[:, :3])


def test_another_length_is_refused() -> None:
    with pytest.raises(DimensionError, match="6 entries along axis 0; the map takes 5"):
        ModalMap(0, torch.ones(3, 5), has_pairs=True).first(torch.zeros(6, 2, 2))
