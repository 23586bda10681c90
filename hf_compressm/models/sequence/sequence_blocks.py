"""The block of LRU, S4D and S5, with its norm and its dropout, and what the layers that mix time share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .recurrent_cache import RecurrentCache


class RecurrentMixer(nn.Module):
    """
    A time-invariant recurrence with a feedthrough `D` in each channel; a class derived from it has `recurrence(u,
    state, return_state)`, which returns output and last state.
    """

    layer_idx: int
    D: Tensor

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, cache: RecurrentCache | None = None) -> Tensor:
        """
        Apply the layer to a batch of sequences.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, H)`): Input.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
            cache ([`RecurrentCache`], *optional*): States to go on from, and to be written to.
        """
        if mask is not None:
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
        state = None if cache is None else cache.states[self.layer_idx]
        # Long sequences need the digits of float32, also under autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            output, state = self.recurrence(hidden_states, state, cache is not None)
        if cache is not None:
            cache.states[self.layer_idx] = state
        return output + hidden_states * self.D.to(hidden_states.dtype)


class MaskedBatchNorm(nn.BatchNorm1d):
    """
    Batch normalisation of `(batch, length, channels)` over all steps that are not padding.

    Gradient checkpointing runs a block a second time, inside the backward pass; the running statistics take part only
    the first time.
    """

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Normalise.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, channels)`): What is normalised.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
        """
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return hidden_states * scale + (self.bias - self.running_mean * scale)
        if mask is None or bool(mask.all()):
            return self._normalise(hidden_states.flatten(0, 1)).view_as(hidden_states)
        normalised = torch.zeros_like(hidden_states)
        normalised[mask] = self._normalise(hidden_states[mask]).to(hidden_states.dtype)
        return normalised

    def _normalise(self, rows: Tensor) -> Tensor:
        if rows.shape[0] < 2:
            raise ValueError(
                f"Batch normalisation needs at least 2 steps in a training batch, this one has {rows.shape[0]}. Use a "
                'larger batch, or `norm="layer"`.'
            )
        # With momentum 1, the statistics of this batch are written to the two tensors.
        mean, variance = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        normalised = F.batch_norm(rows, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        if not _inside_backward_pass():
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
                self.num_batches_tracked.add_(1)
        return normalised


def _inside_backward_pass() -> bool:
    """Whether autograd is running a backward pass on this thread: then a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class SequenceDropout(nn.Dropout):
    """Dropout of `(batch, length, channels)` that drops a channel at all steps of a sequence."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Drop channels in training."""
        if not self.training or self.p == 0:
            return hidden_states
        return hidden_states * F.dropout(torch.ones_like(hidden_states[:, :1]), self.p)


class SequenceBlock(GradientCheckpointingLayer):
    """
    Normalisation, mixer, GELU, dropout, GLU, dropout, residual: the block of LRU, S4D and S5.

    Args:
        mixer (`torch.nn.Module`): What mixes time; called with hidden states, mask and cache.
        hidden_size (`int`): Width.
        dropout (`float`): Dropout probability.
        norm (`str`): `"batch"` or `"layer"`.
        prenorm (`bool`): Whether to normalise the input; otherwise, the result.
    """

    def __init__(self, mixer: nn.Module, hidden_size: int, dropout: float, norm: str, prenorm: bool) -> None:
        super().__init__()
        self.norm = MaskedBatchNorm(hidden_size) if norm == "batch" else nn.LayerNorm(hidden_size)
        self.mixer = mixer
        self.glu = nn.Linear(hidden_size, 2 * hidden_size)
        self.dropout = SequenceDropout(dropout)
        self.prenorm = prenorm

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, cache: RecurrentCache | None = None) -> Tensor:
        """
        One block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): Input.
            mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): True where a step is not padding.
            cache ([`RecurrentCache`], *optional*): States to go on from, and to be written to.
        """
        residual = hidden_states
        if self.prenorm:
            hidden_states = self._normalise(hidden_states, mask)
        hidden_states = self.mixer(hidden_states, mask, cache)
        hidden_states = self.dropout(F.gelu(hidden_states))
        hidden_states = residual + self.dropout(F.glu(self.glu(hidden_states), dim=-1))
        return hidden_states if self.prenorm else self._normalise(hidden_states, mask)

    def _normalise(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(self.norm, MaskedBatchNorm):
            return self.norm(hidden_states, mask)
        return self.norm(hidden_states)
