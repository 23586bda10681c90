"""What a kernel sees of a tensor that is a piece of a larger one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from hf_compressm.ops._strided import rows


def read(tensor: Tensor) -> list:
    """Every entry, as a kernel finds it."""
    flat, by_sequence, by_step = rows(tensor)
    batch, length, channels = tensor.shape
    return [
        [[float(flat[b * by_sequence + t * by_step + c]) for c in range(channels)] for t in range(length)]
        for b in range(batch)
    ]


WHOLE = torch.arange(2.0 * 3 * 10).view(2, 3, 10)
PIECES = {
    "whole": (WHOLE, True),
    "middle": (WHOLE[..., 3:7], True),
    "last": (WHOLE[..., 6:], True),
    "every other sequence": (WHOLE.repeat(2, 1, 1)[::2], True),
    "one step for all": (WHOLE[:, :1].expand(2, 5, 10), True),
    "one channel": (WHOLE[..., 4:5], True),
    "one channel of a transposed": (WHOLE.mT[..., 1:2], True),
    "one sequence": (WHOLE[1:, 1:, 2:4], True),
    "transposed": (WHOLE.mT, False),
    "every other channel": (WHOLE[..., ::2], False),
    "one number for all": (torch.tensor(3.0).expand(2, 3, 4), False),
}


@pytest.mark.parametrize(("tensor", "in_place"), PIECES.values(), ids=PIECES)
def test_every_entry_is_found_and_nothing_copied_that_need_not_be(tensor, in_place) -> None:
    assert read(tensor) == tensor.tolist()
    assert (rows(tensor)[0].__array_interface__["data"][0] == tensor.data_ptr()) is in_place


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_is_seen_of_an_empty_tensor(shape) -> None:
    assert rows(torch.zeros(shape))[0].size == 0


def test_memory_stays_as_long_as_it_is_seen() -> None:
    flat, _, _ = rows(torch.full((2, 3, 4), 7.0).mT)
    gc.collect()
    torch.full((2, 3, 4), 1.0)
    assert (flat == 7).all()
