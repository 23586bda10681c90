"""The small causal models of the accuracy benchmarks: Mamba, its relatives, and time-invariant layers beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from hf_compressm.models import LRUConfig, LRUForCausalLM, S4DConfig, S4DForCausalLM

STATE_SIZE = 64
_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Two state-space layers each; the hybrids have an attention layer between them.
_ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def _mamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = MambaConfig(num_hidden_layers=2, state_size=state_size, time_step_rank=4, **settings)
    return MambaForCausalLM(config)


def _mamba2(state_size: int, **settings: Any) -> PreTrainedModel:
    config = Mamba2Config(
        num_hidden_layers=2,
        state_size=state_size,
        head_dim=16,
        num_heads=settings["hidden_size"] // 8,
        n_groups=1,
        chunk_size=65,
        **settings,
    )
    return Mamba2ForCausalLM(config)


def _falcon_mamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = FalconMambaConfig(num_hidden_layers=2, state_size=state_size, time_step_rank=4, **settings)
    return FalconMambaForCausalLM(config)


def _jamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = JambaConfig(
        mamba_d_state=state_size, mamba_dt_rank=4, attn_layer_period=3, attn_layer_offset=1, num_experts=1,
        num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1, **_ATTENTION, **settings,
    )  # fmt: skip
    return JambaForCausalLM(config)


def _bamba(state_size: int, **settings: Any) -> PreTrainedModel:
    config = BambaConfig(
        mamba_d_state=state_size, mamba_n_heads=settings["hidden_size"] // 8, mamba_d_head=16, mamba_n_groups=1,
        mamba_chunk_size=65, attn_layer_indices=[1], **_ATTENTION, **settings,
    )  # fmt: skip
    return BambaForCausalLM(config)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "falcon_mamba": _falcon_mamba,
    "jamba": _jamba,
    "bamba": _bamba,
}


def _lru(state_size: int, **settings: Any) -> PreTrainedModel:
    return LRUForCausalLM(LRUConfig(num_hidden_layers=2, state_size=state_size, dropout=0.0, **settings))


def _s4d(state_size: int, **settings: Any) -> PreTrainedModel:
    return S4DForCausalLM(S4DConfig(num_hidden_layers=2, state_size=state_size, dropout=0.0, **settings))


TIME_INVARIANT: dict[str, Callable[..., PreTrainedModel]] = {"lru": _lru, "s4d": _s4d}


def make_model(family: str, vocabulary: int, state_size: int = STATE_SIZE, width: int = 32) -> PreTrainedModel:
    """A causal model of `FAMILIES` or `TIME_INVARIANT`, with the weights that torch's present seed gives."""
    return {**FAMILIES, **TIME_INVARIANT}[family](
        state_size, vocab_size=vocabulary, hidden_size=width, **_NO_SPECIAL_TOKENS
    )
