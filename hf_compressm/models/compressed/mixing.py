r"""
Selective mixers that combine the entries of B and C just before their scan.

Where a convolution, an activation or a norm stands between the projections and the scan, a smaller state cannot be
written into the weights of the projections. A mixed layer keeps these as they are, N entries each, and gives its scan
\\( \tilde B_t = W^\top B_t, \tilde C_t = T^\top C_t \\) with trained matrices of shape N x r. The state and the
recurrent cache have r entries. In Mamba-2 A is one number a head, so the dynamics of the projected system are exact.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import (
    apply_mask_to_padding_states,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

try:
    from transformers.integrations.accelerate import force_accelerate_hooks
except ImportError:  # older transformers offload the convolution by themselves

    def force_accelerate_hooks(*_: Any) -> Any:
        """A decorator that changes nothing."""
        return lambda function: function


PREFIX = "Mixed"

# Where transformers has each class that can be mixed, and which classes share Mamba-2's forward pass.
MULTI_HEAD_MIXERS = {
    "BambaMixer": "bamba",
    "FalconH1Mixer": "falcon_h1",
    "GraniteMoeHybridMambaLayer": "granitemoehybrid",
    "Mamba2Mixer": "mamba2",
    "NemotronHMamba2Mixer": "nemotron_h",
    "Zamba2MambaMixer": "zamba2",
}
NORMED_MIXERS = {"FalconMambaMixer": "falcon_mamba", "JambaMambaMixer": "jamba"}
NORMS = {"FalconMambaWeightlessRMSNorm": "falcon_mamba", "JambaRMSNorm": "jamba"}
FOLDED_MIXERS = {"MambaMixer": "mamba", "ZambaMambaMixer": "zamba"}

_made: dict[type, type] = {}


class MixedMultiHead:
    """
    What a mixer of Mamba-2's form does with `input_mixing` and `readout_mixing`, both `(groups, N, r)`.

    The forward pass has the steps of transformers' `Mamba2Mixer` (and of FalconH1's, with its multipliers), without the
    kernel that fuses all of them, which knows no mixing.
    """

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Run the mixer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): Input.
            cache_params (`transformers.Cache`, *optional*): Convolution and recurrent states, `(batch, heads, head_dim,
                r)`, that are read and updated.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.
        """
        dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
        recurrent_state = (
            None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        )
        projected = self._project(apply_mask_to_padding_states(hidden_states, attention_mask))
        gate, driven, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        driven = apply_mask_to_padding_states(self._convolve(driven, cache_params, kwargs), attention_mask)
        width = self.n_groups * self.ssm_state_size
        u, B, C = driven.split([self.intermediate_size, width, width], dim=-1)
        u = u.reshape(batch, length, self.num_heads, self.head_dim)
        B, C = self._mix(B, self.input_mixing), self._mix(C, self.readout_mixing)
        A = -torch.exp(self.A_log.float())
        if recurrent_state is not None and length == 1:
            output = self._step(recurrent_state, u, dt, A, B, C, kwargs)
        else:
            output = mamba2_chunk_scan(
                u, dt, A, B, C, chunk_size=self.chunk_size, D=self.D, z=None, dt_bias=self.dt_bias, dt_softplus=True,
                initial_states=recurrent_state, dt_limit=self.time_step_limit,
                return_final_states=cache_params is not None, **kwargs,
            )  # fmt: skip
            if cache_params is not None:
                output, state = output
                cache_params.update_recurrent_state(state, self.layer_idx)
        output = output.reshape(batch, length, -1)
        output = self.norm(output, gate) if getattr(self, "mamba_rms_norm", True) else output * F.silu(gate)
        return self.out_proj(output.to(dtype))

    def _project(self, hidden_states: Tensor) -> Tensor:
        # FalconH1 scales what goes into the projection and what comes out of it.
        scale = getattr(self, "ssm_in_multiplier", None)
        projected = self.in_proj(hidden_states if scale is None else hidden_states * scale)
        scales = getattr(self, "mup_vector", None)
        return projected if scales is None else projected * scales

    def _convolve(self, driven: Tensor, cache_params: Any, kwargs: dict[str, Any]) -> Tensor:
        length, driven = driven.shape[1], driven.transpose(1, 2)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        state = None if cache_params is None else cache_params.get_conv_state(self.layer_idx, state_idx=0)
        if state is not None and length == 1 and not cache_params.is_recording_past(self.layer_idx):
            return causal_conv1d_update(driven, state, weight, bias, activation=self.activation).transpose(1, 2)
        if cache_params is not None:
            driven = cache_params.update_conv_state(driven, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        driven = causal_conv1d_fn(driven, weight, bias, activation=self.activation, **kwargs)
        return driven[:, :, -length:].transpose(1, 2)

    def _mix(self, entries: Tensor, mixing: Tensor) -> Tensor:
        grouped = entries.unflatten(-1, (self.n_groups, self.ssm_state_size))
        return torch.einsum("blgn,gnr->blgr", grouped, mixing.to(grouped.dtype))

    def _step(
        self, state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        size = B.shape[-1]
        return mamba2_selective_state_update(
            state,
            u[:, 0],
            dt.transpose(1, 2).expand(-1, -1, self.head_dim),
            A[:, None, None].expand(-1, self.head_dim, size),
            B[:, 0],
            C[:, 0],
            self.D[:, None].expand(-1, self.head_dim),
            z=None,
            dt_bias=self.dt_bias[:, None].expand(-1, self.head_dim),
            dt_softplus=True,
            **kwargs,
        )


class MixedNorm:
    """What the norm of B or of C does with `mixing`, `(N, r)`: it combines the entries that it has normalised."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise and combine the last axis, of length N."""
        normalised = super().forward(hidden_states)
        return normalised @ self.mixing.to(normalised.dtype)


class UnfusedFalconMamba:
    """A FalconMamba mixer whose norms combine states, which its fused training kernel does not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the mixer, always by its single steps."""
        training = self.training
        self.training = False  # read for nothing else than the choice of the fused kernel
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


def mixed_class(stock: type[nn.Module]) -> type[nn.Module]:
    """
    The class of a mixer or norm that combines states; the class itself where it has been made or none is needed.

    Args:
        stock (`type`): A class of transformers.
    """
    if stock in _made.values():
        return stock
    if stock not in _made:
        mixin = _mixin(stock.__name__)
        if mixin is None:
            return stock
        doc = f"`{stock.__name__}` of transformers that combines states; see `{mixin.__name__}`."
        _made[stock] = type(PREFIX + stock.__name__, (mixin, stock), {"__module__": __name__, "__doc__": doc})
    return _made[stock]


def _mixin(name: str) -> type | None:
    if name in MULTI_HEAD_MIXERS:
        return MixedMultiHead
    if name in NORMS:
        return MixedNorm
    return UnfusedFalconMamba if name == "FalconMambaMixer" else None


def mixing_sites(mixer: nn.Module) -> list[tuple[nn.Module, str]]:
    """
    The modules and names of the parameters that mix B and C, in this order, whether they are there or not.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers; one that folds its readout has none.
    """
    names = {cls.__name__ for cls in type(mixer).__mro__}
    if names & MULTI_HEAD_MIXERS.keys():
        return [(mixer, "input_mixing"), (mixer, "readout_mixing")]
    if names & NORMED_MIXERS.keys():
        return [(mixer.b_layernorm, "mixing"), (mixer.c_layernorm, "mixing")]
    return []


def mixed_classes(mixer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """
    The modules whose class changes when a mixer gets mixed, each with its new class.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers.
    """
    modules = [mixer, *dict.fromkeys(module for module, _ in mixing_sites(mixer) if module is not mixer)]
    changes = [(module, mixed_class(type(module))) for module in modules]
    return [(module, cls) for module, cls in changes if cls is not type(module)]


def stock_classes(mixer: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """
    The modules of a mixed mixer and the classes of transformers that they had before; empty for a stock one.

    Args:
        mixer (`torch.nn.Module`): A mixer.
    """
    before = {made: stock for stock, made in _made.items()}
    modules = [mixer, *(module for module, _ in mixing_sites(mixer) if module is not mixer)]
    return [(module, before[type(module)]) for module in modules if type(module) in before]


def mix(mixer: nn.Module, size: int) -> None:
    """
    Make a stock mixer a mixed one, in place, that keeps its first states.

    Args:
        mixer (`torch.nn.Module`): A mixer of transformers.
        size (`int`): The number of states after the mixing.
    """
    N = mixer.ssm_state_size
    for module, cls in mixed_classes(mixer):
        module.__class__ = cls
    like = mixer.A_log
    for module, name in mixing_sites(mixer):
        kept = torch.eye(N, size, dtype=like.dtype, device=like.device)
        values = kept.repeat(mixer.n_groups, 1, 1) if module is mixer else kept
        module.register_parameter(name, nn.Parameter(values))
    if like.ndim == 2:
        mixer.A_log = nn.Parameter(like.detach()[:, :size].clone())


def __getattr__(name: str) -> Any:
    homes = {**MULTI_HEAD_MIXERS, **NORMS, "FalconMambaMixer": "falcon_mamba"}
    stock = name.removeprefix(PREFIX)
    if stock == name or stock not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"transformers.models.{homes[stock]}.modeling_{homes[stock]}")
    return mixed_class(getattr(module, stock))
