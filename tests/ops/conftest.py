"""Inputs of the recurrences."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hf_compressm.ops import _gramians_cpu, _gramians_torch

ScanArguments = dict[str, Tensor]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scan_arguments() -> Callable[..., ScanArguments]:
    """Makes the arguments of a selective scan; decays from almost 1 to almost 0."""

    def make(
        batch: int, length: int, channels: int, n_states: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> ScanArguments:
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        arguments = {
            "u": normal(batch, length, channels),
            "delta": normal(batch, length, channels).sub(1).exp(),
            "A": -normal(channels, n_states).exp(),
            "B": normal(batch, length, n_states),
            "C": normal(batch, length, n_states),
            "initial_state": normal(batch, channels, n_states),
        }
        return {name: tensor.to(dtype) for name, tensor in arguments.items()}

    return make


def state_kernels() -> list[ModuleType]:
    """All that samples states and runs here; Triton's kernel where its interpreter is asked for."""
    found = [_gramians_cpu, _gramians_torch]
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        found.append(importlib.import_module("hf_compressm.ops._gramians_triton"))
    return found
