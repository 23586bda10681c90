"""Tiny models with linear attention, grouped value heads and a layer of full attention among them."""

from __future__ import annotations

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    KimiLinearConfig,
    OlmoHybridConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen4ExpTextConfig,
)

from hf_compressm.models.compressed import STOCK_FAMILIES

VOCABULARY, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 24, 2, 4, 8, 6

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    # The defaults lie outside of a tiny vocabulary.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GATED = {
    **_COMMON, "head_dim": 8, "linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": HEADS,
    "linear_key_head_dim": KEY_DIM, "linear_value_head_dim": VALUE_DIM,
}  # fmt: skip
_KIMI = {
    **_COMMON, "linear_num_heads": KEY_HEADS, "linear_head_dim": KEY_DIM, "mlp_layer_types": ["dense"] * 3,
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

CONFIGS = {
    "qwen3_next": lambda: Qwen3NextConfig(**_GATED, mlp_only_layers=[0, 1, 2]),
    "qwen3_5": lambda: Qwen3_5TextConfig(**_GATED),
    "olmo_hybrid": lambda: OlmoHybridConfig(**_GATED),
    "kimi_linear": lambda: KimiLinearConfig(**_KIMI),
}


def tiny_delta_rule_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of random weights by the name of its family."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for module in model.modules():
        if hasattr(module, "A_log"):
            # Decays that leave something to remember.
            module.A_log.data.uniform_(-4, -1)
    return model


_EXPERTS = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_INDEXED = {
    **_GATED, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
GATED_CONFIGS = {
    "qwen3_next": lambda **settings: Qwen3NextConfig(
        **{**_GATED, **_EXPERTS, "mlp_only_layers": [0], "tie_word_embeddings": True, **settings}
    ),
    "qwen3_5": lambda **settings: Qwen3_5TextConfig(**{**_GATED, **settings}),
    "qwen3_5_moe": lambda **settings: Qwen3_5MoeTextConfig(**{**_GATED, **_EXPERTS, **settings}),
    "qwen4_exp": lambda **settings: Qwen4ExpTextConfig(
        **{**_INDEXED, **_EXPERTS, "hc_count": 2, "hc_lowrank": 4, **settings}
    ),
    "olmo_hybrid": lambda **settings: OlmoHybridConfig(**{**_GATED, "linear_allow_neg_eigval": True, **settings}),
}


def tiny_gated_delta_net(name: str, state_size: int = KEY_DIM, seed: int = 0, **settings) -> PreTrainedModel:
    """A model of gated DeltaNet with weights large enough that its layers do something, by its family."""
    torch.manual_seed(seed)
    config = GATED_CONFIGS[name](**{"linear_key_head_dim": state_size, "initializer_range": 0.2, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in delta_layers(model):
        layer.A_log.data.uniform_(-4, -1)
    return model


# Ling has one size for the heads of both kinds of attention.
_LING = {
    **{name: value for name, value in _KIMI.items() if not name.startswith("linear_")}, "head_dim": KEY_DIM,
    "num_mtp_layers": 0,
}  # fmt: skip
_SPARSE = {
    "mlp_layer_types": ["dense", "sparse", "dense"], "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
KIMI_CONFIGS = {
    "kimi_linear": lambda **settings: KimiLinearConfig(**{**_KIMI, **_SPARSE, "num_local_experts": 4, **settings}),
    "bailing_hybrid": lambda **settings: transformers.BailingHybridConfig(
        **{**_LING, **_SPARSE, "num_local_experts": 4, **settings}
    ),
}
# Version 5.17 of transformers has not all of them.
KIMI_CONFIGS = {name: build for name, build in KIMI_CONFIGS.items() if STOCK_FAMILIES[name].is_installed}


def tiny_kimi_delta(name: str, seed: int = 0, **settings) -> PreTrainedModel:
    """A model of Kimi delta attention with decays that leave something to remember, by its family."""
    torch.manual_seed(seed)
    config = KIMI_CONFIGS[name](**{"initializer_range": 0.2, **settings})
    return _remembering(AutoModelForCausalLM.from_config(config).eval())


_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
_GLM_TEXT = {
    **{name: value for name, value in _KIMI.items() if name not in ("q_lora_rank", "qk_rope_head_dim")},
    "q_lora_rank": 8, "qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 2, "index_head_dim": 8, "index_n_heads": 2,
    "indexer_types": ["full"] * 3, "hc_mult": 2, "initializer_range": 0.2, **_SPARSE, "n_routed_experts": 4,
}  # fmt: skip
SEEING_CONFIGS = {
    **{
        family: lambda family=family, name=name: getattr(transformers, name)(
            text_config=GATED_CONFIGS[family](initializer_range=0.2).to_dict(),
            vision_config={**_VISION, "num_position_embeddings": 16},
        )
        for family, name in [
            ("qwen3_5", "Qwen3_5Config"), ("qwen3_5_moe", "Qwen3_5MoeConfig"), ("qwen4_exp", "Qwen4ExpConfig"),
        ]
    },
    "glm5_next": lambda: transformers.Glm5NextConfig(
        text_config=_GLM_TEXT,
        vision_config={**_VISION, "image_size": 28, "projection_intermediate_size": 16},
    ),
}  # fmt: skip


def tiny_seeing_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model that also sees, around a text model of linear attention, by the family of that one."""
    torch.manual_seed(seed)
    return _remembering(AutoModelForImageTextToText.from_config(SEEING_CONFIGS[name]()).eval())


def _remembering(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-4, -1)
        if name.endswith("forget_gate.dt_bias"):
            parameter.data.uniform_(-4, 0)
    return model


_LAYERS = ("GatedDeltaNet", "DeltaAttention", "TextLinearAttention")


def delta_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of linear attention."""
    return [module for module in model.modules() if type(module).__name__.endswith(_LAYERS)]
