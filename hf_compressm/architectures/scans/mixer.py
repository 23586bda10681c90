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
from torch import Tensor, nn

from ...ops import causal_convolution, causal_convolution_step, plain_eager_call, selective_scan, selective_step
from .cached_states import CachedStates, states_for_step
from .convolution import ACTIVATIONS
from .mixer_forms import MixerForm, SingleForm
from .switch import current_observer, fast_cpu_scan_enabled, is_packed, register_companions


def register_mixer(module_name: str, mixer: str, form: type[MixerForm] = SingleForm) -> None:
    """
    Make known a mixer whose forward pass is that of Mamba.

    Args:
        module_name (`str`): The module that the mixer is written in.
        mixer (`str`): The name of its class.
        form (`type`, *optional*): How it holds its projections, a [`~architectures.scans.mixer_forms.MixerForm`];
            that of Mamba when unset.
    """
    register_companions(module_name, {f"{mixer}.forward": functools.partial(mixer_replacement, form=form())})


def mixer_replacement(stock: Callable[..., Tensor], form: MixerForm) -> Callable[..., Tensor]:
    """
    What replaces the mixer's `forward`: of whole sequences without a cache, and of single steps from a cached state.

    All else that it doesn't know is for the stock.

    Args:
        stock (`Callable`): What it replaces.
        form ([`~architectures.scans.mixer_forms.MixerForm`]): How the mixer holds its projections.
    """
    masked = _masking_of(stock)

    @functools.wraps(stock)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if masked is None or args or not _fused_mixer_applies(form, self, hidden_states, **kwargs):
            return stock(self, hidden_states, *args, **kwargs)
        cache, mask, states = _cache_in(**kwargs), kwargs.get("attention_mask"), None
        if cache is not None:
            if form.takes_steps:
                states = states_for_step(cache, self, form.parameters_read(self), hidden_states, mask)
            if states is None:
                return stock(self, hidden_states, *args, **kwargs)
        return _fused_forward(form, self, hidden_states, functools.partial(masked, attention_mask=mask), states)

    return forward


def _cache_in(cache: Any = None, cache_params: Any = None, **_: Any) -> Any:
    """The cache among the arguments of a mixer; its name has changed."""
    return cache_params if cache is None else cache


def _masking_of(forward: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """What sets padding to zero in a mixer's forward pass."""
    # Private API of transformers.
    return inspect.unwrap(forward).__globals__.get("apply_mask_to_padding_states")


def _fused_mixer_applies(form: MixerForm, mixer: nn.Module, hidden_states: Tensor, **kwargs: Any) -> bool:
    if torch.compiler.is_compiling() or not fast_cpu_scan_enabled() or current_observer() is not None:
        return False
    if is_packed(**kwargs) or not form.matches(mixer) or hidden_states.ndim != 3:
        return False
    tensors = (hidden_states, *form.parameters_read(mixer))
    return plain_eager_call(*tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def _fused_forward(
    form: MixerForm,
    mixer: nn.Module,
    hidden_states: Tensor,
    masked: Callable[[Tensor], Tensor],
    states: CachedStates | None,
) -> Tensor:
    x, gate = form.input_and_gate(mixer.in_proj(masked(hidden_states)))
    convolve, scan = _recurrences(states)
    convolution, silu = mixer.conv1d, ACTIVATIONS[mixer.activation]
    x = masked(convolve(x, convolution.weight.squeeze(1), convolution.bias, silu=silu))
    outputs = [scan(**each._asdict(), delta_softplus=True) for each in form.scans(mixer, x, gate)]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return mixer.out_proj(output.to(hidden_states.dtype))


def _recurrences(states: CachedStates | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The convolution and the scan of a sequence, or those of one step from cached states."""
    if states is None:
        return causal_convolution, lambda *args, **kwargs: selective_scan(*args, **kwargs)[0]
    convolve = functools.partial(causal_convolution_step, states.convolution)
    return convolve, functools.partial(selective_step, states.recurrent)
