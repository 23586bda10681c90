r"""
The mixed form of lightning attention: keys and queries of fewer entries behind their activation.

A head keeps a matrix of N x d_v numbers, \\( S_t = \lambda S_{t-1} + k_t v_t^\top \\), and gives \\( S_t^\top q_t \\).
The decay is one number a head, so \\( W^\top S_t \\) obeys the same equation with \\( W^\top k_t \\) for every W, and
its state cannot grow, whatever training does to W. The classes of transformers make all three parts of one size; so the
forward pass is written here, block by block as it is there.

Source of the layer: MiniMax, 2025, "MiniMax-01: Scaling Foundation Models with Lightning Attention" (arXiv 2501.08313);
of the blocks, Qin et al., 2024, "Lightning Attention-2" (arXiv 2401.04658), algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .mixed_scan import mixed_entries


class MixedLightning:
    r"""
    What a mixer of the kind `"lightning"` does with `input_mixing` and `readout_mixing`, both `(heads, N, r)`: its
    attention gets \\( W^\top k \\) and \\( T^\top q \\). The state in a cache is `(batch, heads, r, N)`.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Run the mixer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): Input.
            position_embeddings (`tuple`, *optional*): Of no use here.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.
            cache (`transformers.Cache`, *optional*): Holds the states, which are read and updated.
            past_key_values (`transformers.Cache`, *optional*): The name of the cache before transformers 5.24.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The output, and the state after the last step.
        """
        cache = past_key_values if cache is None else cache
        query, key, value = self.queries_keys_values(self.qkv_proj(hidden_states), attention_mask)
        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        output, state = self._attend(*(x.transpose(1, 2) for x in (query, key, value)), state)
        output = self.norm(output.transpose(1, 2).flatten(2))
        output = self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * output)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        return output, state

    def queries_keys_values(self, projected: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """
        What the attention gets for an output of `qkv_proj`.

        Args:
            projected (`torch.Tensor` of shape `(batch, length, heads * 3 * N)`): The output.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Queries and keys `(batch, length, heads, r)`, values
            `(batch, length, heads, N)`.
        """
        query, key, value = stock_queries_keys_values(self, projected, attention_mask)
        return mixed_entries(query, self.readout_mixing), mixed_entries(key, self.input_mixing), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs `(batch, heads, length, d_v)` and the last state; all arguments have heads before steps."""
        if state is None:
            state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
        outputs = []
        blocks = (x.split(self.block_size, dim=2) for x in (query, key, value))
        for queries, keys, values in zip(*blocks):
            length = queries.shape[2]
            scores = (queries @ keys.mT) * self.diagonal_decay[:, :, :length, :length]
            outputs.append((queries * self.query_decay[:, :length]) @ state + scores @ values)
            written = (keys * self.key_decay[:, -length:]).mT @ values
            state = torch.exp(-self.slope_rate * length) * state + written
        return torch.cat(outputs, dim=2), state


def stock_queries_keys_values(
    mixer: Any, projected: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    What a stock layer of lightning attention makes of an output of its `qkv_proj`, `(batch, length, heads, N)` each.

    Args:
        mixer (`torch.nn.Module`): The layer.
        projected (`torch.Tensor` of shape `(batch, length, heads * 3 * N)`): The output.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding.
    """
    activated = mixer.act_fn(projected)
    if attention_mask is not None:
        activated = (activated * attention_mask[:, :, None]).to(activated.dtype)
    return activated.unflatten(-1, (mixer.num_attention_heads, 3, mixer.head_dim)).unbind(-2)
