"""Which kernels walk along time and sample states: compiled ones where there are some for the device."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from . import _gramians_cpu, _gramians_torch


def implementation_for(device: torch.device) -> ModuleType:
    """
    The module with `sampled_outer_products` and `sampled_states` for a device.

    Args:
        device (`torch.device`): Where the arguments are.
    """
    if device.type == "cpu":
        return _gramians_cpu
    return (_triton() if device.type == "cuda" else None) or _gramians_torch


@cache
def _triton() -> ModuleType | None:
    """The kernels in Triton, which torch brings along on Linux and not everywhere; None without it."""
    try:
        return importlib.import_module("._gramians_triton", __package__)
    except ImportError:
        return None
