"""What a cache of transformers holds for a mixer, and whether one step may be written to it in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops import plain_eager_call


class CachedStates(NamedTuple):
    """
    The states of one mixer, as they lie in its cache.

    Args:
        convolution (`torch.Tensor` of shape `(batch, channels, K)`): The last inputs of the convolution.
        recurrent (`torch.Tensor` of shape `(batch, channels, N)`): The state of the scan.
    """

    convolution: Tensor
    recurrent: Tensor


def states_for_step(
    cache: Any, mixer: nn.Module, parameters: list[nn.Parameter], hidden_states: Tensor, mask: Tensor | None
) -> CachedStates | None:
    """
    The states that one step of a mixer starts from, or None where the step is not one for a kernel.

    A kernel writes to the states, so it takes no gradient; and it knows one dtype a call.

    Args:
        cache (`Any`): As the mixer gets it.
        mixer (`torch.nn.Module`): A mixer of Mamba's form.
        parameters (`list[torch.nn.Parameter]`): The parameters that the step reads.
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): The input of the mixer.
        mask (`torch.Tensor`, *optional*): Its attention mask.
    """
    batch, length = hidden_states.shape[:2]
    if length != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if mask is not None and tuple(mask.shape) != (batch, length):
        return None
    states = _states_in(cache, mixer.layer_idx)
    if states is None or not plain_eager_call(*states):
        return None
    channels, n_states = mixer.A_log.shape
    expected = (batch, channels, mixer.conv1d.weight.shape[-1]), (batch, channels, n_states)
    if any(tuple(state.shape) != shape or not state.is_contiguous() for state, shape in zip(states, expected)):
        return None
    dtype = states.recurrent.dtype
    if dtype not in (torch.float32, torch.float64) or any(state.requires_grad for state in states):
        return None
    tensors = (*states, hidden_states, *parameters)
    return states if all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors) else None


def _states_in(cache: Any, layer_index: int) -> CachedStates | None:
    """None before the first step, and where the cache keeps all that it has seen, to take steps back later."""
    # Private API of transformers.
    layers = getattr(cache, "layers", ())
    layer = layers[layer_index] if layer_index < len(layers) else None
    # A layer may hold several of each; a mixer uses the first.
    begun, *states = (
        getattr(layer, name, {}).get(0) for name in ("has_previous_state", "conv_states", "recurrent_states")
    )
    if not begun or getattr(layer, "record_past", True) or not all(isinstance(state, Tensor) for state in states):
        return None
    return CachedStates(*states)
