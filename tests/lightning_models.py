"""Tiny models with lightning attention, blocks shorter than a sequence and a layer of full attention among them."""

from __future__ import annotations

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

VOCABULARY, HEADS, KEY_DIM, BLOCK = 24, 2, 8, 6

_SETTINGS = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "block_size": BLOCK,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.2,
    # The defaults lie outside of a tiny vocabulary.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_minimax(state_size: int = KEY_DIM, seed: int = 0, **settings) -> MiniMaxForCausalLM:
    """A MiniMax with weights large enough that its layers do something."""
    torch.manual_seed(seed)
    return MiniMaxForCausalLM(MiniMaxConfig(**{**_SETTINGS, "head_dim": state_size, **settings})).eval()
