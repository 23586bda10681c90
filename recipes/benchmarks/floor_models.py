"""
The models of the benchmark of the floor, and each of them with nothing but its matrix products and norms.

Everything between the projections of a mixer is left out there: each projection gets a tensor that lies ready, forward
and backward, so that all of its products are computed and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import make_mamba
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from hf_compressm.models import LRUConfig, LRUForCausalLM, S4DConfig, S4DForCausalLM

_VOCABULARY = 27
_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@functools.cache
def _ready(shape: tuple[int, ...]) -> Tensor:
    """A tensor that lies ready."""
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


class _LeftOut(torch.autograd.Function):
    """Takes tensors and gives one of another shape, at no cost, in both directions."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.shapes = [tuple(tensor.shape) for tensor in inputs]
        return _ready(shape).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_ready(shape) for shape in ctx.shapes)


def _mamba(mixer: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    shape = (*hidden_states.shape[:2], mixer.intermediate_size)
    x = _LeftOut.apply(shape, mixer.in_proj(hidden_states))
    low_rank = _LeftOut.apply((*shape[:2], mixer.time_step_rank), mixer.x_proj(x))
    return mixer.out_proj(_LeftOut.apply(shape, F.linear(low_rank, mixer.dt_proj.weight)))


def _mamba2(mixer: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    shape = (*hidden_states.shape[:2], mixer.intermediate_size)
    return mixer.out_proj(mixer.norm(_LeftOut.apply(shape, mixer.in_proj(hidden_states))))


def _gated_delta_net(mixer: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    heads = (hidden_states.shape[0] * hidden_states.shape[1] * mixer.num_v_heads, mixer.head_v_dim)
    projected = mixer.in_proj_qkvz(hidden_states), mixer.in_proj_ba(hidden_states)
    output, gate = (_LeftOut.apply(heads, tensor) for tensor in projected)
    return mixer.out_proj(mixer.norm(output, gate).view(*hidden_states.shape[:2], -1))


def _lru(mixer: nn.Module, hidden_states: Tensor, *_: Any) -> Tensor:
    # Real and imaginary parts of the input and the output matrix.
    drive = F.linear(hidden_states, mixer.B.movedim(-1, 0).flatten(0, 1))
    return F.linear(_LeftOut.apply(tuple(drive.shape), drive), mixer.C.flatten(1))


def _s4d(mixer: nn.Module, hidden_states: Tensor, *_: Any) -> Tensor:
    """Its systems read and write one channel: there is no product."""
    return _LeftOut.apply(tuple(hidden_states.shape), hidden_states)


_ALONE = {
    "MambaMixer": _mamba,
    "Mamba2Mixer": _mamba2,
    "Qwen3NextGatedDeltaNet": _gated_delta_net,
    "LRU": _lru,
    "S4D": _s4d,
}


def products_alone(model: nn.Module) -> nn.Module:
    """The same model, its mixers changed to do without all that is neither a matrix product nor a norm."""
    for module in model.modules():
        if type(module).__name__ in _ALONE:
            module.forward = functools.partial(_ALONE[type(module).__name__], module)
    return model


def _make_mamba2(state_size: int, hidden_size: int, layers: int) -> nn.Module:
    head_dim = min(64, hidden_size)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": state_size}
    heads = {"num_heads": 2 * hidden_size // head_dim, "head_dim": head_dim, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, **_TOKENS))


def _make_gated_delta_net(state_size: int, hidden_size: int, layers: int) -> nn.Module:
    head_dim = min(64, hidden_size)
    heads = 2 * hidden_size // head_dim
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            intermediate_size=2 * hidden_size,
            layer_types=["linear_attention"] * layers,
            mlp_only_layers=list(range(layers)),
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=hidden_size // 2,
            linear_num_key_heads=heads // 2,
            linear_num_value_heads=heads,
            linear_key_head_dim=state_size,
            linear_value_head_dim=head_dim,
            # A cache without any layer of attention has no length.
            use_cache=False,
            **_TOKENS,
        )
    )


def _make_own(
    model_class: type[nn.Module], config_class: type, state_size: int, hidden_size: int, layers: int
) -> nn.Module:
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": state_size}
    return model_class(config_class(**sizes, vocab_size=_VOCABULARY, dropout=0.0))


class Family(NamedTuple):
    """
    A family of the table.

    Args:
        make (`Callable`): Builds a causal model for a state size, a width (`hidden_size`) and a number of `layers`.
        state_sizes (`Sequence[int]`): The state sizes that are measured.
        is_stock (`bool`): Whether transformers has the model, so that its own code is a peer.
        has_mambapy (`bool`): Whether transformers runs it through mambapy on request.
        has_steps (`bool`): Whether this library has kernels for the single steps of generation.
    """

    make: Callable[..., nn.Module]
    state_sizes: Sequence[int] = (64, 8)
    is_stock: bool = True
    has_mambapy: bool = False
    has_steps: bool = False


FAMILIES = {
    "Mamba": Family(make_mamba, (128, 64, 16, 8), has_mambapy=True, has_steps=True),
    "Mamba-2": Family(_make_mamba2),
    "gated DeltaNet": Family(_make_gated_delta_net),
    "LRU": Family(functools.partial(_make_own, LRUForCausalLM, LRUConfig), is_stock=False),
    "S4D": Family(functools.partial(_make_own, S4DForCausalLM, S4DConfig), is_stock=False),
}
