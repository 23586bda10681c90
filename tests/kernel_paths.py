"""Which functions of transformers have a kernel of another package behind them, and how to do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor


@contextmanager
def torch_path(*others: ModuleType) -> Iterator[None]:
    """
    transformers' own code in the place of the kernels, which it calls for tensors on a CPU too.

    Args:
        others (`ModuleType`): Modules that call kernels, beside those of Mamba and Mamba-2.
    """
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    from hf_compressm.models.compressed import mixed_multi_head

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_mamba, modeling_mamba2, mixed_multi_head, *others):
            for name, function in list(vars(module).items()):
                if implementation(function) is not None:
                    patch.setattr(module, name, inspect.unwrap(function))
        yield


def homes(module: ModuleType) -> dict[str, str]:
    """The packages whose functions a module of transformers calls, by its own names for these."""
    found = {name: implementation(function) for name, function in vars(module).items()}
    return {name: kernel.__module__.split(".")[0] for name, kernel in found.items() if kernel is not None}


def implementation(function: object) -> Callable | None:
    """What a function of transformers calls that has a kernel of another package behind it."""
    if not (inspect.isfunction(function) and hasattr(function, "__wrapped__")):
        return None
    return inspect.getclosurevars(function).nonlocals.get("implementation")


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """That a tensor is finite and no entry is further from what is expected than a share of the largest one."""
    assert found.shape == expected.shape and torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
