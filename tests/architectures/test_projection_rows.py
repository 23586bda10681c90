"""The rows that projections keep, as data, and how a layer's layout and moments follow them."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.architectures import (
    KeptRows,
    MeasuredTruncation,
    ProjectionRows,
    StateAxis,
    find_layers,
    row_multiple,
)
from hf_compressm.architectures.moment_maps.mixing import MixingMap
from hf_compressm.architectures.state_layout import runs
from hf_compressm.errors import DimensionError
from hf_compressm.systems import Truncation
from tests.selective_models import tiny_jamba, tiny_mamba2


def kept(*indices: int, size: int = 4) -> KeptRows:
    return KeptRows(torch.tensor(indices), torch.eye(size, dtype=torch.float64)[:, list(indices)])


@pytest.mark.parametrize(
    "indices, T, message",
    [
        ([0, 2], torch.zeros(4, 3), "they must be"),
        ([0, 1, 2], torch.zeros(2, 3), "M at most N"),
        ([2, 0], torch.zeros(4, 2), "distinct rows of 4, ascending"),
        ([1, 1], torch.zeros(4, 2), "distinct rows of 4, ascending"),
        ([1, 4], torch.zeros(4, 2), "distinct rows of 4, ascending"),
    ],
)
def test_rows_that_are_none_are_refused(indices: list[int], T: torch.Tensor, message: str) -> None:
    with pytest.raises(DimensionError, match=message):
        KeptRows(torch.tensor(indices), T.double())


def test_both_sides_have_one_size() -> None:
    with pytest.raises(DimensionError, match="one projected size"):
        ProjectionRows(kept(0, 1), kept(0, 1, 2))


def test_what_is_folded_reads_the_kept_rows_as_all_were_read() -> None:
    generator = torch.Generator().manual_seed(0)
    T, W = (torch.randn(2, 5, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    entries = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    folded = KeptRows(torch.arange(3).expand(2, -1), T).fold(W)
    torch.testing.assert_close(entries @ folded, (entries @ T.mT) @ W)


def test_processes_see_other_rows_in_the_fingerprint() -> None:
    truncation = MeasuredTruncation.of(Truncation.from_indices([0, 1], 4))
    prints = {
        truncation.with_rows(ProjectionRows(kept(0, 1), kept(*other))).fingerprint() for other in ((0, 1), (1, 3))
    }
    assert len(prints | {truncation.fingerprint()}) == 3


def test_runs_of_other_roles_keep_other_entries() -> None:
    axis = StateAxis("weight", 0, (2, *runs("B", 2), *runs("C", 2), 1))
    B, C = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0, 1], [0, 2]])
    found = axis.kept({"B": B, "C": C}, 3)
    assert found.tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 11, 13, 14]


def test_moments_of_a_matrix_are_those_of_the_rows_that_stay() -> None:
    """A matrix that entries b read has the gradient b g^T; autograd has that of fewer rows and combined columns."""
    generator = torch.Generator().manual_seed(0)
    b, target = (torch.randn(50, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    columns, rows = torch.randn(2, 3, generator=generator, dtype=torch.float64), torch.tensor([1, 2, 5])
    old = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    (b @ old * target).sum().backward()
    new = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    (((b[:, rows] * gain) @ new) @ columns * target).sum().backward()
    moved = MixingMap(columns, 1, rows, gain)
    torch.testing.assert_close(moved.first(old.grad), new.grad)
    expected = (old.grad.square()[rows] * gain.square()[:, None]) @ columns.square().mT
    torch.testing.assert_close(moved.second(old.grad.square()), expected)
    assert torch.equal(moved.sliced().first(old.grad), old.grad[rows][:, :2])


def test_kernels_of_the_convolution_say_which_rows_they_take() -> None:
    # 2 x 2 channels a row in Mamba-2 with two groups; none in Jamba, whose B and C come after the convolution.
    assert row_multiple(find_layers(tiny_mamba2())[0]) == 2
    assert row_multiple(find_layers(tiny_jamba())[0]) == 1
