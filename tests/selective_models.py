"""Tiny models of the selective families, with several groups or heads where the family knows them."""

from __future__ import annotations

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

VOCABULARY = 24
_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, **_SPECIAL_TOKENS}


def _seeded(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], seed: int, settings: dict
) -> PreTrainedModel:
    """A model with weights large enough that its layers do something."""
    torch.manual_seed(seed)
    return model_class(config_class(**{**_COMMON, "initializer_range": 0.2, **settings}))


def tiny_falcon_mamba(state_size: int = 8, seed: int = 0, **overrides) -> FalconMambaForCausalLM:
    """Two FalconMamba layers."""
    settings = {"num_hidden_layers": 2, "state_size": state_size, "time_step_rank": 3}
    return _seeded(FalconMambaForCausalLM, FalconMambaConfig, seed, {**settings, **overrides})


def tiny_jamba(state_size: int = 8, seed: int = 0, **overrides) -> JambaForCausalLM:
    """Two Mamba layers and one attention layer."""
    settings = {
        "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 3,
        "expert_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 16,
        "mamba_d_state": state_size, "mamba_dt_rank": 3, "use_associative_scan": False,
    }  # fmt: skip
    return _seeded(JambaForCausalLM, JambaConfig, seed, {**_ATTENTION, **settings, **overrides})


def tiny_zamba(state_size: int = 8, seed: int = 0, **overrides) -> ZambaForCausalLM:
    """Two Mamba layers of two heads, each with the shared attention layer before it."""
    settings = {
        "num_hidden_layers": 2, "layers_block_type": ["hybrid", "hybrid"], "intermediate_size": 16,
        "mamba_d_state": state_size, "mamba_dt_rank": 3, "n_mamba_heads": 2, "use_associative_scan": False,
    }  # fmt: skip
    return _seeded(ZambaForCausalLM, ZambaConfig, seed, {**_ATTENTION, **settings, **overrides})


def tiny_mamba2(state_size: int = 8, seed: int = 0, **overrides) -> Mamba2ForCausalLM:
    """Two Mamba-2 layers of four heads in two groups."""
    settings = {
        "num_hidden_layers": 2, "state_size": state_size, "num_heads": 4, "head_dim": 8, "n_groups": 2,
        "chunk_size": 8, "time_step_min": 0.05, "time_step_max": 0.5,
    }  # fmt: skip
    return _seeded(Mamba2ForCausalLM, Mamba2Config, seed, {**settings, **overrides})


def tiny_zamba2(state_size: int = 8, seed: int = 0, **overrides) -> Zamba2ForCausalLM:
    """Two Mamba-2 layers, the second with a shared attention layer before it."""
    settings = {
        "num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"], "intermediate_size": 16,
        "mamba_d_state": state_size, "n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": 8, "adapter_rank": 4,
    }  # fmt: skip
    return _seeded(Zamba2ForCausalLM, Zamba2Config, seed, {**_ATTENTION, **settings, **overrides})


def tiny_bamba(state_size: int = 8, seed: int = 0, **overrides) -> BambaForCausalLM:
    """Two Mamba-2 layers and an attention layer."""
    settings = {
        "num_hidden_layers": 3, "attn_layer_indices": [1], "intermediate_size": 16, "mamba_d_state": state_size,
        "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8,
    }  # fmt: skip
    return _seeded(BambaForCausalLM, BambaConfig, seed, {**_ATTENTION, **settings, **overrides})


def tiny_falcon_h1(state_size: int = 8, seed: int = 0, **overrides) -> FalconH1ForCausalLM:
    """Two layers with a Mamba-2 mixer beside attention, and multipliers that differ."""
    settings = {
        "num_hidden_layers": 2, "intermediate_size": 16, "mamba_d_ssm": 32, "mamba_d_state": state_size,
        "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8, "mamba_conv_bias": True,
        "mamba_proj_bias": True, "ssm_multipliers": [0.9, 1.1, 0.7, 1.3, 0.8], "ssm_in_multiplier": 1.2,
    }  # fmt: skip
    return _seeded(FalconH1ForCausalLM, FalconH1Config, seed, {**_ATTENTION, **settings, **overrides})


def tiny_granite_moe_hybrid(state_size: int = 8, seed: int = 0, **overrides) -> GraniteMoeHybridForCausalLM:
    """Two Mamba-2 layers and an attention layer, all with experts."""
    settings = {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 16, "shared_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
        "mamba_d_state": state_size, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8,
    }  # fmt: skip
    return _seeded(GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, seed, {**_ATTENTION, **settings, **overrides})


def tiny_nemotron_h(state_size: int = 8, seed: int = 0, **overrides) -> NemotronHForCausalLM:
    """Two Mamba-2 layers, an attention layer and a feed-forward layer."""
    settings = {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"], "head_dim": 8,
        "intermediate_size": 16, "ssm_state_size": state_size, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "n_groups": 2, "chunk_size": 8, "time_step_min": 0.05,
    }  # fmt: skip
    return _seeded(NemotronHForCausalLM, NemotronHConfig, seed, {**_ATTENTION, **settings, **overrides})
