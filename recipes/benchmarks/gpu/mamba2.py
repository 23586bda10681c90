"""Mamba-2: stock, cut by selection and cut to the mixed form, at state sizes that are and are not multiples of 16."""

from __future__ import annotations

from functools import partial

import torch

from hf_compressm.architectures import find_layers
from hf_compressm.models.compressed.mixing import mix

from .comparison import HEADER, cells, measured
from .language_models import make, token_batch
from .session import Session, kernels_in_place

# Full state size, kept ones, layers, width, vocabulary, batch, length, repeats, decoded sequences, decoded tokens.
SETTING = (128, (64, 24, 16, 8), 12, 768, 256, 8, 2048, 7, 128, 32)
TINY = (16, (8, 4), 2, 64, 27, 2, 16, 1, 2, 3)


def run(session: Session) -> None:
    """Time the forms side by side."""
    if not (kernels_in_place() or session.tiny):
        raise RuntimeError("mamba-ssm or causal-conv1d is not there; gpu/build_kernels.py builds them")
    full, kept, layers, width, vocabulary, batch_size, length, repeats, prompts, new = TINY if session.tiny else SETTING
    shape = {"chunk_size": 8, "head_dim": 16} if session.tiny else {}
    batch = token_batch(session, batch_size, length, vocabulary)
    stock = f"stock, N = {full}"
    builders = {stock: partial(make, "mamba2", full, width, layers, vocabulary, **shape)}
    for size in kept:
        builders[f"selection, N = {size}"] = partial(make, "mamba2", size, width, layers, vocabulary, **shape)
    for size in kept:
        builders[f"mixed, N = {size}"] = partial(mixed, size, full, width, layers, vocabulary, **shape)
    figures = measured(session, builders, batch, repeats, prompts, new)
    rows = []
    for name in builders:
        form, size = name.split(", N = ")
        rows.append([form, size, *cells(figures.get(name), figures.get(stock))])
    session.write(
        "gpu_mamba2",
        f"Mamba-2 by form and state size, {layers} layers of width {width}, batch {batch_size} x {length}",
        ["form", "N", *HEADER],
        rows,
        figures,
        "`Mamba2ForCausalLM` with mamba-ssm's chunk scan, random weights and tokens, vocabulary 256, in the forms that "
        "a cut leaves: a smaller stock model (selection), or the projections of the first with smaller states (mixed). "
        "Training step: bf16 autocast, forward, backward, fused AdamW; medians of synchronised calls, the models "
        "taking turns; in brackets against the stock model. Memory: the most that torch had allocated for that model. "
        "Decoding in bf16 of 128 sequences, 32 tokens each, by `generate` and by replaying one captured step as a CUDA "
        "graph.",
    )


def mixed(size: int, full: int, width: int, layers: int, vocabulary: int, **shape: int) -> torch.nn.Module:
    """A model of the full size whose layers mix their states down to a smaller one."""
    model = make("mamba2", full, width, layers, vocabulary, **shape)
    for layer in find_layers(model):
        mix(layer.module, size)
    return model
