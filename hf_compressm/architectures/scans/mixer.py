"""
What replaces the forward pass of a Mamba mixer in transformers: the same steps in the layout of its projections.

transformers turns what a projection makes to (batch, channels, length), as its kernels for GPUs want it, and back for
the next projection. On a CPU these copies, and the gradients of them, cost as much as the scan. Here every tensor stays
(batch, length, channels), and all that stands between two projections is one kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import causal_convolution, causal_convolution_step, selective_scan, selective_step
from ..parameters import has_hook_of_accelerate, own_parameters
from .cached_states import CachedStates, states_for_step
from .convolution import ACTIVATIONS
from .switch import current_observer, fast_cpu_scan_enabled, is_packed, plain_eager_call, register_companions

_PARTS = (
    "A_log", "D", "activation", "in_proj", "layer_idx", "out_proj", "ssm_state_size", "time_step_rank", "x_proj",
)  # fmt: skip
_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
# Modules whose weights the forward pass reads, instead of calling them.
_READ = {"conv1d": nn.Conv1d, "dt_proj": nn.Linear}


def register_mixer(module_name: str, mixer: str) -> None:
    """
    Make known a mixer whose forward pass is that of Mamba.

    Args:
        module_name (`str`): The module that the mixer is written in.
        mixer (`str`): The name of its class.
    """
    register_companions(module_name, {f"{mixer}.forward": mixer_replacement})


def mixer_replacement(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """
    What replaces the mixer's `forward`: of whole sequences without a cache, and of single steps from a cached state.

    All else that it doesn't know is for the stock.
    """
    masked = _masking_of(stock)

    @functools.wraps(stock)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if masked is None or args or not _fused_mixer_applies(self, hidden_states, **kwargs):
            return stock(self, hidden_states, *args, **kwargs)
        cache, mask, states = _cache_in(**kwargs), kwargs.get("attention_mask"), None
        if cache is not None:
            states = states_for_step(cache, self, _parameters_read(self), hidden_states, mask)
            if states is None:
                return stock(self, hidden_states, *args, **kwargs)
        return _fused_forward(self, hidden_states, functools.partial(masked, attention_mask=mask), states)

    return forward


def _cache_in(cache: Any = None, cache_params: Any = None, **_: Any) -> Any:
    """The cache among the arguments of a mixer; its name has changed."""
    return cache_params if cache is None else cache


def _masking_of(forward: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """What sets padding to zero in a mixer's forward pass."""
    # Private API of transformers.
    return inspect.unwrap(forward).__globals__.get("apply_mask_to_padding_states")


def _fused_mixer_applies(mixer: nn.Module, hidden_states: Tensor, **kwargs: Any) -> bool:
    if torch.compiler.is_compiling() or not fast_cpu_scan_enabled() or current_observer() is not None:
        return False
    if is_packed(**kwargs) or not _is_known(mixer) or hidden_states.ndim != 3:
        return False
    tensors = (hidden_states, *_parameters_read(mixer))
    return plain_eager_call(*tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def _parameters_read(mixer: nn.Module) -> list[nn.Parameter]:
    """The parameters that the forward pass reads by itself."""
    owners = (mixer, *(getattr(mixer, name) for name in _READ))
    found = [parameter for owner in owners for parameter in own_parameters(owner).values()]
    return [parameter for parameter in found if parameter is not None]


def _is_known(mixer: nn.Module) -> bool:
    """Whether the mixer has the parts of a Mamba mixer, and those whose weights are read are no wrappers of others."""
    if not all(hasattr(mixer, name) for name in _PARTS) or _is_quantised(mixer):
        return False
    has_norms = [hasattr(mixer, name) for name in _NORMS]
    if any(has_norms) != all(has_norms) or mixer.activation not in ACTIVATIONS:
        return False
    read = [getattr(mixer, name, None) for name in _READ]
    # A hook of accelerate brings weights to the device before they are read, which the stock forward pass sees to.
    return all(type(part) is cls and not has_hook_of_accelerate(part) for part, cls in zip(read, _READ.values()))


def _is_quantised(mixer: nn.Module) -> bool:
    # Private API of transformers.
    return hasattr(mixer.config, "_is_quantized")


def _fused_forward(
    mixer: nn.Module, hidden_states: Tensor, masked: Callable[[Tensor], Tensor], states: CachedStates | None
) -> Tensor:
    x, gate = mixer.in_proj(masked(hidden_states)).chunk(2, dim=-1)
    convolution, dt_proj, silu = mixer.conv1d, mixer.dt_proj, ACTIVATIONS[mixer.activation]
    convolve, scan = _recurrences(states)
    x = masked(convolve(x, convolution.weight.squeeze(1), convolution.bias, silu=silu))
    n_states = mixer.ssm_state_size
    time_step, B, C = mixer.x_proj(x).split([mixer.time_step_rank, n_states, n_states], dim=-1)
    if hasattr(mixer, _NORMS[0]):
        time_step, B, C = (getattr(mixer, name)(tensor) for name, tensor in zip(_NORMS, (time_step, B, C)))
    output = scan(
        x,
        F.linear(time_step, dt_proj.weight),
        -torch.exp(mixer.A_log.float()),
        B,
        C,
        D=mixer.D.float(),
        z=gate,
        delta_bias=None if dt_proj.bias is None else dt_proj.bias.float(),
        delta_softplus=True,
    )
    return mixer.out_proj(output.to(hidden_states.dtype))


def _recurrences(states: CachedStates | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The convolution and the scan of a sequence, or those of one step from cached states."""
    if states is None:
        return causal_convolution, lambda *args, **kwargs: selective_scan(*args, **kwargs)[0]
    convolve = functools.partial(causal_convolution_step, states.convolution)
    return convolve, functools.partial(selective_step, states.recurrent)
