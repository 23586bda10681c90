"""The small causal models of the benchmarks of linear attention."""

from __future__ import annotations

import math

import torch
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

FAMILIES = ("gated_delta_net", "kimi_delta", "minimax", "xlstm")
KEY_SIZE = 64
LAYERS = 2
# Steps after which a head of decay rate one starts with a decay of 1 / e: from 10 to 1000.
_TIME_STEPS = (0.001, 0.1)
_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False}


def make_delta_rule_model(
    family: str, vocabulary: int, key_size: int = KEY_SIZE, heads: int = 2, value_size: int = 32
) -> PreTrainedModel:
    """
    A causal model of two layers of width 64, with the weights that torch's present seed gives.

    Args:
        family (`str`): One of `FAMILIES`.
        vocabulary (`int`): Number of different tokens.
        key_size (`int`, *optional*, defaults to 64): Entries of a key, the state size of a head. One size is for keys
            and values in Kimi delta attention and lightning attention.
        heads (`int`, *optional*, defaults to 2): Heads of each layer; four times as many in xLSTM.
        value_size (`int`, *optional*, defaults to 32): Entries of a value, for gated DeltaNet.
    """
    shared = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
        "layer_types": ["linear_attention"] * LAYERS, "num_attention_heads": 2, **_NO_SPECIAL_TOKENS,
    }  # fmt: skip
    if family == "kimi_delta":
        return KimiLinearForCausalLM(
            KimiLinearConfig(
                **shared, num_key_value_heads=2, mlp_layer_types=["dense"] * LAYERS, kv_lora_rank=8, v_head_dim=8,
                qk_nope_head_dim=8, qk_rope_head_dim=4, linear_num_heads=heads, linear_head_dim=key_size,
            )
        )  # fmt: skip
    if family == "minimax":
        return MiniMaxForCausalLM(
            MiniMaxConfig(
                **{**shared, "num_attention_heads": heads}, num_key_value_heads=1, head_dim=key_size,
                num_local_experts=1, num_experts_per_tok=1,
            )
        )  # fmt: skip
    if family == "xlstm":
        return xLSTMForCausalLM(
            xLSTMConfig(
                vocab_size=vocabulary, hidden_size=64, num_hidden_layers=LAYERS, num_heads=4 * heads,
                qk_dim_factor=4 * heads * key_size / 64, ffn_proj_factor=2.0, chunk_size=32,
                autocast_kernel_dtype="float32", **_NO_SPECIAL_TOKENS,
            )
        )  # fmt: skip
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **shared, num_key_value_heads=1, head_dim=32, mlp_only_layers=list(range(LAYERS)),
            linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=key_size,
            linear_value_head_dim=value_size,
        )
    )  # fmt: skip
    _start_remembering(model)
    return model


def _start_remembering(model: PreTrainedModel) -> None:
    """
    Draw the first decays of gated DeltaNet as the class of Kimi Linear does (and before it Mamba-2's authors).

    transformers starts Qwen3-Next, of which only trained weights are used, with heads most of which forget everything
    within a step: a small model then learns nothing of what lies further back.
    """
    low, high = (math.log(value) for value in _TIME_STEPS)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            time_step = torch.empty_like(parameter).uniform_(low, high).exp()
            # The inverse of softplus.
            parameter.data.copy_(time_step + torch.log(-torch.expm1(-time_step)))
