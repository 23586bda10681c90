"""What the switch puts in the place of the scan of Mamba and its kin (one diagonal A a channel)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import selective_scan
from .scan_inputs import SelectiveScanInputs
from .scan_switch import (
    current_observer,
    fast_cpu_scan_enabled,
    is_packed,
    plain_eager_call,
    register_scan,
    warn_of_packing,
)


def register_selective_scan(module_name: str) -> None:
    """
    Make known that a module's global names hold the scan of Mamba, by transformers' names or by mamba-ssm's.

    Args:
        module_name (`str`): The module that the family's forward pass is written in.
    """
    register_scan(
        module_name,
        {
            "mamba_selective_scan": selective_scan_replacement,
            "selective_scan_fn": selective_scan_replacement,
            "mamba_inner_fn": inner_function_replacement,
        },
    )


def selective_scan_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of `mamba_selective_scan` (transformers) or `selective_scan_fn` (mamba-ssm)."""

    @functools.wraps(stock)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        observer = None if torch.compiler.is_compiling() else current_observer()
        fast = _fused_scan_applies(hidden_states, dt, A, B, C, **kwargs)
        if observer is None and not fast:
            return stock(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        delta = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        delta = F.softplus(delta) if delta_softplus else delta
        inputs = SelectiveScanInputs(hidden_states.mT, delta.mT, A, B.mT, C.mT)
        if fast:
            output, state = selective_scan(inputs.u, inputs.delta, A, inputs.B, inputs.C)
        else:
            output, state = stock(hidden_states, delta, A, B, C, return_last_state=True, **kwargs)
            output = output.mT
        if observer is not None:
            if is_packed(**kwargs):
                warn_of_packing()
            output = observer.observe(inputs, output)
        output = output.mT
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        if z is not None:
            output = output * F.silu(z)
        return (output, state) if return_last_state else output

    return scan


def _fused_scan_applies(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> bool:
    if not fast_cpu_scan_enabled() or not plain_eager_call(hidden_states, dt, A, B, C):
        return False
    if hidden_states.device.type != "cpu" or A.is_complex() or B.ndim != 3 or C.ndim != 3:
        return False
    # Packed sequences reset the state at their borders, which the fused scan does not do.
    return not is_packed(**kwargs)


def inner_function_replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of `mamba_inner_fn`: None, transformers' own sign to go on through the scan."""

    @functools.wraps(stock)
    def inner(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            ours = fast_cpu_scan_enabled() and projected_states.device.type == "cpu"
            if ours or current_observer() is not None:
                return None
        return stock(projected_states, *args, **kwargs)

    return inner
