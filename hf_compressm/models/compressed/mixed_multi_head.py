"""The forward pass of a mixer of Mamba-2's form that combines the entries of B and C just before its scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Private API of transformers.
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


def earlier_states(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None, bool]:
    """
    What a cache holds of the steps before those of this pass, in every release of transformers from 5.17.

    Args:
        cache (`transformers.Cache`, *optional*): The cache of the pass.
        layer (`int`): Number of the layer.

    Returns:
        `tuple`: The state of the convolution `(batch, channels, kernel)` and the recurrent state `(batch, heads,
        head_dim, r)`, both `None` before the first pass, and whether the cache records what it may have to take back.
    """
    if cache is None:
        return None, None, False
    if hasattr(cache, "get_recurrent_state"):
        recording = cache.is_recording_past(layer)
        return cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0), recording
    if not cache.has_previous_state(layer):
        return None, None, False
    held = cache.layers[layer]  # before 5.21 a cache has no methods for these
    return held.conv_states[0], held.recurrent_states[0], held.record_past


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
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Run the mixer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): Input.
            cache (`transformers.Cache`, *optional*): Convolution and recurrent states, `(batch, heads, head_dim, r)`,
                that are read and updated.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.
            cache_params (`transformers.Cache`, *optional*): The name of the cache before transformers 5.24.
        """
        cache = cache_params if cache is None else cache
        dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
        conv_state, recurrent_state, recording = earlier_states(cache, self.layer_idx)
        projected = self._project(apply_mask_to_padding_states(hidden_states, attention_mask))
        gate, driven, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        # A cache that records what it may have to take back grows its convolution's state even by single steps.
        stepping = conv_state is not None and length == 1 and not recording
        driven = self._convolve(driven, cache, conv_state if stepping else None, kwargs)
        driven = apply_mask_to_padding_states(driven, attention_mask)
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
                return_final_states=cache is not None, **kwargs,
            )  # fmt: skip
            if cache is not None:
                output, state = output
                cache.update_recurrent_state(state, self.layer_idx)
        output = output.reshape(batch, length, -1)
        output = self.norm(output, gate) if getattr(self, "mamba_rms_norm", True) else output * F.silu(gate)
        return self.out_proj(output.to(dtype))

    def _project(self, hidden_states: Tensor) -> Tensor:
        # FalconH1 scales what goes into the projection and what comes out of it.
        scale = getattr(self, "ssm_in_multiplier", None)
        projected = self.in_proj(hidden_states if scale is None else hidden_states * scale)
        scales = getattr(self, "mup_vector", None)
        return projected if scales is None else projected * scales

    def _convolve(self, driven: Tensor, cache: Any, state: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        length, driven = driven.shape[1], driven.transpose(1, 2)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if state is not None:
            return causal_conv1d_update(driven, state, weight, bias, activation=self.activation).transpose(1, 2)
        if cache is not None:
            driven = cache.update_conv_state(driven, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
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
