"""Decompositions of small matrices, each in one thread.

A factorisation of a few hundred rows gains nothing from threads and can lose much: they wait for one another at every
step, and where others want the same cores, that takes far longer than the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# From here on the work of a factorisation outweighs what its threads cost.
_LARGE = 1024


def _in_one_thread(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of torch, in one thread where its first argument is on the CPU and not large."""

    @functools.wraps(decompose)
    def alone(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1 or matrix.device.type != "cpu" or min(matrix.shape[-2:]) >= _LARGE:
            return decompose(matrix, *args, **kwargs)
        torch.set_num_threads(1)
        try:
            return decompose(matrix, *args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone


cholesky_ex = _in_one_thread(torch.linalg.cholesky_ex)
cond = _in_one_thread(torch.linalg.cond)
eig = _in_one_thread(torch.linalg.eig)
eigh = _in_one_thread(torch.linalg.eigh)
qr = _in_one_thread(torch.linalg.qr)
solve = _in_one_thread(torch.linalg.solve)
solve_ex = _in_one_thread(torch.linalg.solve_ex)
svd = _in_one_thread(torch.linalg.svd)
svdvals = _in_one_thread(torch.linalg.svdvals)
