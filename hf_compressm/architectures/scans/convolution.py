"""What replaces the short convolution in front of a scan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...ops import causal_convolution, plain_eager_call
from .switch import fast_cpu_scan_enabled, is_packed, register_companions

# What the fused convolution knows to do after the filter, by transformers' names, and whether it is a SiLU.
ACTIVATIONS = {None: False, "silu": True, "swish": True}
# What causal_conv1d's function of this name knows to do besides.
_STATES = ("initial_states", "return_final_states", "final_states_out")


def register_convolution(module_name: str) -> None:
    """
    Make known that a module's forward pass calls the convolution by transformers' name.

    Args:
        module_name (`str`): The module that the family's forward pass is written in.
    """
    register_companions(module_name, {"causal_conv1d_fn": convolution_replacement})


def convolution_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """
    What replaces `causal_conv1d_fn`, in the layout in which a projection leaves its output: steps one behind the other,
    each with its channels next to each other.
    """

    @functools.wraps(stock)
    def convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not _fused_convolution_applies(hidden_states, weight, bias, activation, **kwargs):
            return stock(hidden_states, weight, bias, activation=activation, **kwargs)
        return causal_convolution(hidden_states.mT, weight, bias, silu=ACTIVATIONS[activation]).mT

    return convolution


def _fused_convolution_applies(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, **kwargs: Any
) -> bool:
    given = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
    if not fast_cpu_scan_enabled() or not plain_eager_call(*given) or hidden_states.device.type != "cpu":
        return False
    # What comes from a cache lies the other way round, and a copy costs what the stock function does.
    if hidden_states.ndim != 3 or hidden_states.stride(1) != 1 or activation not in ACTIVATIONS:
        return False
    return not is_packed(**kwargs) and not any(kwargs.get(name) is not None for name in _STATES)
