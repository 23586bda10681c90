"""Mamba by state size: training step, memory and decoding, with mamba-ssm's kernels and without them."""

from __future__ import annotations

from functools import partial

from .comparison import HEADER, cells, measured
from .language_models import make, token_batch
from .session import Session, kernels_in_place

STATE_SIZES = (128, 64, 32, 16, 12, 8)
# Layers, width, vocabulary, batch, length, repeats, decoded sequences, decoded tokens. The second is as mamba-130m.
SETTINGS = ((4, 768, 256, 8, 2048, 10, 0, 0), (24, 768, 50280, 8, 2048, 7, 128, 32))
WITHOUT_KERNELS = ((4, 768, 256, 2, 256, 3, 0, 0),)
TINY = ((2, 32, 27, 2, 16, 1, 2, 3),)
TINY_STATE_SIZES = (8, 4)


def run(session: Session) -> None:
    """With mamba-ssm's kernels."""
    if not (kernels_in_place() or session.tiny):
        raise RuntimeError("mamba-ssm or causal-conv1d is not there; gpu/build_kernels.py builds them")
    _table(session, "gpu_mamba", "with mamba-ssm's kernels", TINY if session.tiny else SETTINGS, STATE_SIZES)


def run_without_kernels(session: Session) -> None:
    """In a process that hides mamba-ssm and causal-conv1d, where transformers runs a Python loop over time."""
    settings = TINY if session.tiny else WITHOUT_KERNELS
    _table(session, "gpu_mamba_without_kernels", "without mamba-ssm", settings, (128, 64, 16, 8))


def _table(session: Session, name: str, how: str, settings: tuple, sizes: tuple[int, ...]) -> None:
    sizes = TINY_STATE_SIZES if session.tiny else sizes
    rows, figures = [], {}
    for layers, width, vocabulary, batch_size, length, repeats, prompts, new in settings:
        batch = token_batch(session, batch_size, length, vocabulary)
        builders = {f"{layers} layers, N = {n}": partial(make, "mamba", n, width, layers, vocabulary) for n in sizes}
        found = measured(session, builders, batch, repeats, prompts, new)
        figures[f"{layers} layers of width {width}, batch {batch_size} x {length}, vocabulary {vocabulary}"] = found
        reference = found.get(f"{layers} layers, N = {sizes[0]}")
        for n in sizes:
            shape = f"{layers} x {width}, {batch_size} x {length}"
            rows.append([shape, str(n), *cells(found.get(f"{layers} layers, N = {n}"), reference)])
    session.write(
        name,
        f"Mamba by state size {how}",
        ["layers x width, batch", "N", *HEADER],
        rows,
        figures,
        "Stock `MambaForCausalLM`, random weights and tokens; vocabulary 256 at 4 layers, 50,280 at 24. Training step: "
        "bf16 autocast, forward, backward, fused AdamW; medians of synchronised calls, the state sizes taking turns; "
        "in brackets against the largest N. Memory: the most that torch had allocated for that model, its optimizer "
        "and its activations. Decoding in bf16 of 128 sequences, 32 tokens each: by `generate`, most of which is "
        "Python between the kernels, and by replaying one captured step as a CUDA graph.",
    )
