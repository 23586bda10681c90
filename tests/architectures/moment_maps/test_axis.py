"""Maps along one axis move gradients and moments as autograd does."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.architectures import AxisMap, AxisSelection, Rescaling
from hf_compressm.errors import DimensionError


def test_axis_map_moves_gradients_like_autograd() -> None:
    """If the old weight is W_old = M^T W_new, the new gradient is M times the old one."""
    M = torch.randn(3, 5, dtype=torch.float64)
    new = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    old = (M.T @ new.detach()).requires_grad_()

    def loss(weight):
        return (weight.sin() * torch.arange(20.0, dtype=torch.float64).reshape(5, 4)).sum()

    loss(old).backward()
    loss(M.T @ new).backward()
    assert torch.allclose(AxisMap(0, M).first(old.grad), new.grad)


@pytest.mark.parametrize("axis", [0, 1])
def test_second_moments_move_with_squares_and_stay_non_negative(axis: int) -> None:
    matrix = torch.randn(3, 5, dtype=torch.float64)
    moment = torch.rand((5, 7) if axis == 0 else (7, 5))
    moved = AxisMap(axis, matrix).second(moment)
    expected = torch.einsum("ij,jk->ik" if axis == 0 else "ij,kj->ki", matrix**2, moment.double())
    assert moved.dtype == torch.float32 and torch.allclose(moved.double(), expected) and (moved >= 0).all()


def test_axis_map_refuses_another_length() -> None:
    with pytest.raises(DimensionError, match="6 entries along axis 0; the map takes 5"):
        AxisMap(0, torch.eye(5, dtype=torch.float64)).first(torch.zeros(6, 2))


def test_a_selection_moves_moments_as_rows_of_the_identity_do() -> None:
    kept = torch.tensor([1, 3, 4])
    selection, matrix = AxisSelection(1, kept, 6), AxisMap(1, torch.eye(6, dtype=torch.float64)[kept], kept)
    moment = torch.rand(4, 6)
    assert torch.equal(selection.first(moment), matrix.first(moment))
    assert torch.equal(selection.second(moment), matrix.second(moment))
    assert torch.equal(selection.sliced().first(moment.T, axis=0), matrix.sliced().first(moment.T, axis=0))
    with pytest.raises(DimensionError, match="5 entries along axis 1; the map takes 6"):
        selection.first(torch.zeros(2, 5))


def test_each_block_is_mapped_by_its_own_matrix() -> None:
    matrices = torch.randn(2, 3, 5, dtype=torch.float64)
    kept = torch.tensor([[0, 2, 4], [1, 2, 3]])
    moment = torch.rand(2, 5, 7, dtype=torch.float64)
    blocks, singles = AxisMap(1, matrices, kept), [AxisMap(0, M, k) for M, k in zip(matrices, kept)]
    for move in ("first", "second"):
        expected = torch.stack([getattr(single, move)(part) for single, part in zip(singles, moment)])
        torch.testing.assert_close(getattr(blocks, move)(moment), expected)
    picked = torch.stack([single.sliced().first(part) for single, part in zip(singles, moment)])
    torch.testing.assert_close(blocks.sliced().first(moment), picked)
    # A factor of Adafactor's lacks the last axis.
    torch.testing.assert_close(blocks.second(moment[..., 0]), blocks.second(moment)[..., 0])


def test_moments_of_a_rescaled_parameter() -> None:
    moment = torch.rand(4, 3)
    halved = Rescaling(0.5)
    assert torch.equal(halved.first(moment), moment / 2) and torch.equal(halved.second(moment), moment / 4)
    assert torch.equal(halved.sliced().first(moment), moment)
    assert torch.equal(halved.second(moment[:, 0], axis=0), moment[:, 0] / 4)
