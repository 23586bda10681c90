"""Gated DeltaNet: stock, cut by selection and cut to the mixed form, by size of the keys."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hf_compressm.architectures import find_layers
from hf_compressm.models.compressed.mixing import mix

from .comparison import HEADER, cells, measured
from .language_models import token_batch
from .session import Session

# Full size of the keys, kept ones, layers, width, key heads, value heads, size of the values, vocabulary, batch,
# length, repeats, decoded sequences, decoded tokens.
SETTING = (128, (64, 32, 16), 8, 1024, 8, 16, 128, 256, 8, 2048, 7, 128, 16)
TINY = (16, (8, 4), 2, 32, 2, 4, 8, 27, 2, 16, 1, 2, 3)


def run(session: Session) -> None:
    """Time the forms side by side."""
    if not (importlib.util.find_spec("fla") or session.tiny):
        raise RuntimeError("flash-linear-attention is not there; transformers would run a loop in Python instead")
    full, kept, layers, width, keys, values, value_dim, vocabulary, batch_size, length, repeats, prompts, new = (
        TINY if session.tiny else SETTING
    )
    batch = token_batch(session, batch_size, length, vocabulary)
    shape = (layers, width, keys, values, value_dim, vocabulary)
    stock = f"stock, d_k = {full}"
    builders = {stock: partial(make, full, *shape)}
    builders |= {f"selection, d_k = {size}": partial(make, size, *shape) for size in kept}
    builders |= {f"mixed, d_k = {size}": partial(mixed, size, full, *shape) for size in kept}
    figures = measured(session, builders, batch, repeats, prompts, new, replay=False)
    rows = []
    for name in builders:
        form, size = name.split(", d_k = ")
        rows.append([form, size, *cells(figures.get(name), figures.get(stock))[:-1]])
    session.write(
        "gpu_delta_rule",
        f"Gated DeltaNet by form and key size, {layers} layers of width {width}, batch {batch_size} x {length}",
        ["form", "d_k", *HEADER[:-1]],
        rows,
        figures,
        f"`Qwen3_5ForCausalLM`, one layer in four of full attention, {keys} key heads, {values} value heads of "
        f"{value_dim} entries, the kernels of flash-linear-attention, random weights and tokens, vocabulary 256, in "
        "the forms that a cut leaves: a smaller stock model (selection), or the projections of the first with fewer "
        "entries of each key behind the norm (mixed). Training step: bf16 autocast, forward, backward, fused AdamW; "
        "medians of synchronised calls, the models taking turns; in brackets against the stock model. Memory: the most "
        "that torch had allocated for that model. Decoding in bf16 of 128 sequences, 16 tokens each.",
    )


def make(
    key_dim: int, layers: int, width: int, keys: int, values: int, value_dim: int, vocabulary: int
) -> PreTrainedModel:
    """A stock causal model with the same weights at each call."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        # One layer in four has full attention, as in the published models.
        layer_types=["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)],
        linear_key_head_dim=key_dim,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_value_head_dim=value_dim,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Drawing a hundred million numbers takes a CPU seconds.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen3_5ForCausalLM(config)


def mixed(size: int, full: int, *shape: int) -> PreTrainedModel:
    """A model of the full size whose layers combine the entries of their keys to fewer."""
    model = make(full, *shape)
    for layer in find_layers(model):
        mix(layer.module, size)
    return model
