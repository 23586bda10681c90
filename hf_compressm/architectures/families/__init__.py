"""The model families; importing this package registers them."""

from . import (  # noqa: F401
    bamba,
    falcon_h1,
    falcon_mamba,
    granite_moe_hybrid,
    jamba,
    kimi_delta,
    lru,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    olmo_hybrid,
    qwen3_5,
    qwen3_5_moe,
    qwen3_next,
    qwen4_exp,
    s4d,
    xlstm,
    zamba,
    zamba2,
)
