"""
A made-up model that no library has, as its authors would publish it: a memory that is written, forgotten and read.

Each head has a memory M of some slots: `M_t = f_t M_{t-1} + w_t v_t^T`, `y_t = M_t^T r_t`. What writes and what reads
are rows of one projection, side by side in each head, and pass an activation and a norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


@strict
class ToyConfig(PreTrainedConfig):
    """Sizes of the toy."""

    model_type = "toy"

    vocab_size: int = 32
    hidden_size: int = 16
    num_hidden_layers: int = 2
    num_heads: int = 2
    slots: int = 8


def remember(
    value: Tensor, forget: Tensor, write: Tensor, read: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    The recurrence, step by step.

    Args:
        value (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): What is written.
        forget (`torch.Tensor` of shape `(batch, length, heads)`): The share of the memory that stays, from 0 to 1.
        write (`torch.Tensor` of shape `(batch, length, heads, slots)`): Where it is written.
        read (`torch.Tensor` of shape `(batch, length, heads, slots)`): Where the memory is read.
        memory (`torch.Tensor` of shape `(batch, heads, slots, head_dim)`, *optional*): The memory before.
    """
    if memory is None:
        memory = value.new_zeros(*write[:, 0].shape, value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        memory = forget[:, t, :, None, None] * memory + write[:, t, :, :, None] * value[:, t, :, None]
        outputs.append(torch.einsum("bhsd,bhs->bhd", memory, read[:, t]))
    return torch.stack(outputs, 1), memory


class ToyMixer(nn.Module):
    """One layer of memories."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.slots = config.num_heads, config.slots
        self.address = nn.Linear(config.hidden_size, 2 * config.num_heads * config.slots)
        self.content = nn.Linear(config.hidden_size, config.hidden_size)
        self.keep = nn.Linear(config.hidden_size, config.num_heads)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From `(batch, length, hidden_size)` to the same shape."""
        addresses = F.silu(self.address(hidden_states)).unflatten(-1, (self.num_heads, 2, self.slots))
        write, read = F.normalize(addresses, dim=-1).unbind(-2)
        value = self.content(hidden_states).unflatten(-1, (self.num_heads, -1))
        output, _ = remember(value, torch.sigmoid(self.keep(hidden_states)), write, read=read)
        return self.out(output.flatten(2))


class ToyForCausalLM(PreTrainedModel):
    """A language model of toy layers."""

    config: ToyConfig
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyMixer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs) -> CausalLMOutput:
        """Scores of the next token, and the loss where labels are given."""
        hidden_states = self.embeddings(input_ids)
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        logits = self.lm_head(self.norm(hidden_states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
