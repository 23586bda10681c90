"""The descent on matrices, against least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_compressm.systems import MOST_ENTRIES, descend, inverse_root


def regression(seed: int = 0, condition: float = 1e3, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated entries, what two matrices behind one another make of them, and the entries' second moment."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    entries = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    entries = entries * torch.logspace(0, -torch.log10(torch.tensor(condition)), 6, dtype=torch.float64) @ basis
    wanted = entries @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    wanted = wanted + 0.1 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return entries, wanted, entries.mT @ entries / rows


def judge_of(entries: Tensor, wanted: Tensor, held_out: Tensor | None = None):
    """Errors of a linear map, relative to the energy of what is wanted."""
    held_out = torch.ones(len(entries), dtype=torch.bool) if held_out is None else held_out
    fitted = torch.ones_like(held_out) if held_out.all() else ~held_out

    def judge(matrices: list[Tensor]) -> tuple[float, float, list[Tensor]]:
        (M,) = (matrix.detach().requires_grad_(True) for matrix in matrices)
        with torch.enable_grad():
            squares = (entries @ M - wanted).square().sum(-1)
            error = squares[fitted].sum() / wanted[fitted].square().sum()
            [gradient] = torch.autograd.grad(error, [M])
        squares = squares.detach()
        return float(error.detach()), float(squares[held_out].sum() / wanted[held_out].square().sum()), [gradient]

    return judge


@given(st.integers(0, 50), st.sampled_from([1.0, 10.0]))
def test_the_end_is_that_of_least_squares_however_the_entries_are_correlated(seed: int, condition: float) -> None:
    entries, wanted, moment = regression(seed, condition)
    least = torch.linalg.lstsq(entries, wanted).solution
    judge = judge_of(entries, wanted)
    [found] = descend(judge, [torch.zeros_like(least)], [inverse_root(moment)])
    assert judge([found])[0] <= judge([least])[0] * 1.001


def test_coordinates_in_which_the_entries_are_alike_lead_further() -> None:
    entries, wanted, moment = regression(condition=1e3)
    judge, start = judge_of(entries, wanted), torch.zeros(6, 3, dtype=torch.float64)
    ends = [judge(descend(judge, [start], [root]))[0] for root in (inverse_root(moment), None)]
    assert ends[0] <= ends[1] < judge([start])[0]


def test_what_is_held_out_decides_where_it_ends() -> None:
    """With as many parameters as rows the fit can be made as good as one likes, and worse elsewhere."""
    entries, wanted, moment = regression(rows=40)
    wanted = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    held_out = torch.arange(40) >= 8
    judge, start = judge_of(entries, wanted, held_out), torch.zeros(6, 3, dtype=torch.float64)
    found = descend(judge, [start], [inverse_root(moment)])
    assert judge(found)[1] <= judge([start])[1]


@pytest.mark.parametrize("error", [0.0, 1e-12, float("nan"), float("inf")])
def test_nothing_is_done_where_nothing_is_left_or_no_error_is_a_number(error: float) -> None:
    calls = []

    def judge(matrices: list[Tensor]) -> tuple[float, float, list[Tensor]]:
        calls.append(matrices)
        return error, error, [torch.ones_like(M) for M in matrices]

    start = [torch.randn(4, 2)]
    assert descend(judge, start, [None])[0] is start[0]
    assert len(calls) == 1


def test_a_slope_that_is_no_number_leaves_the_best_that_was_met() -> None:
    def judge(matrices: list[Tensor]) -> tuple[float, float, list[Tensor]]:
        size = float(matrices[0].square().sum())
        return (1.0, 1.0, [matrices[0]]) if size == 4 else (float("nan"),) * 2 + ([matrices[0] * torch.nan],)

    start = [torch.ones(2, 2)]
    assert torch.equal(descend(judge, start, [None])[0], start[0])


def test_a_root_whitens_and_keeps_the_scale() -> None:
    _, _, moment = regression(condition=10)
    root = inverse_root(moment)
    whitened = root @ moment @ root
    values = torch.linalg.eigvalsh(whitened)
    assert float(values.max() / values.min()) < float(torch.linalg.cond(moment)) / 5
    assert float(root.diagonal().mean()) == pytest.approx(1)
    stacked = inverse_root(torch.stack([moment, 4 * moment]))
    torch.testing.assert_close(stacked[0] / stacked[1], torch.full((6, 6), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "moment", [torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.ones(1, 1).expand(2 * [MOST_ENTRIES + 1])]
)
def test_there_is_no_root_of_nothing_of_no_numbers_and_of_too_many(moment: Tensor) -> None:
    assert inverse_root(moment) is None
