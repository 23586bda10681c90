"""Tiny xLSTMs, trainable without a cache."""

from __future__ import annotations

from unittest import mock

import torch
from transformers import xLSTMConfig, xLSTMForCausalLM, xLSTMModel

VOCABULARY, HEADS, KEY_DIM = 24, 8, 16

_SETTINGS = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": HEADS, "chunk_size": 8,
    "autocast_kernel_dtype": "float32", "ffn_proj_factor": 1.0,
    # In transformers a training with a cache stops in its backward pass.
    "use_cache": False,
    # The defaults lie inside of a tiny vocabulary.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_xlstm(state_size: int = KEY_DIM, seed: int = 0, **settings) -> xLSTMForCausalLM:
    """An xLSTM whose gates depend on its input, with open and shut ones among them."""
    torch.manual_seed(seed)
    share = state_size * HEADS / _SETTINGS["hidden_size"]
    config = xLSTMConfig(**{**_SETTINGS, "qk_dim_factor": share, **settings})
    # The initial values of transformers fail on fused gates; those of torch stay then.
    initial = (lambda *_: None) if config.weight_mode == "fused" else xLSTMForCausalLM._init_weights
    with (
        mock.patch.object(xLSTMForCausalLM, "_init_weights", initial),
        mock.patch.object(xLSTMModel, "_init_weights", initial),
    ):
        model = xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_preact" in name or "ifgate" in name:
                parameter.normal_(0.0, 1.0)
            elif name.split(".")[-2] in ("q", "k", "qkv_opreact"):
                parameter.normal_(0.0, 0.5)
    return model
