"""Mamba-2: stock, cut by selection and cut to the mixed form, at state sizes that are and are not multiples of 16."""

from __future__ import annotations

import copy
from functools import partial

import torch

from hf_compressm import CompreSSMConfig, compress

from .comparison import HEADER, cells, measured
from .language_models import make, token_batch
from .session import Session, kernels_in_place

FORMS = {"selection": {"stock": True, "reductor": "selection"}, "mixed": {}}
# Full state size, kept ones, layers, width, vocabulary, batch, length, repeats, decoded sequences, decoded tokens.
SETTING = (128, (64, 32, 24, 16, 8), 12, 768, 256, 8, 2048, 7, 128, 32)
TINY = (16, (8, 4), 2, 32, 27, 2, 16, 1, 2, 3)


def run(session: Session) -> None:
    """Cut one model to every size in both forms, and time all of them."""
    if not (kernels_in_place() or session.tiny):
        raise RuntimeError("mamba-ssm or causal-conv1d is not there; gpu/build_kernels.py builds them")
    full, kept, layers, width, vocabulary, batch_size, length, repeats, prompts, new = TINY if session.tiny else SETTING
    shape = {"chunk_size": 8, "head_dim": 16} if session.tiny else {}
    batch = token_batch(session, batch_size, length, vocabulary)
    model = make("mamba2", full, width, layers, vocabulary, **shape).to(session.device)
    calibration = {key: value[:2, :256] for key, value in batch.items()}
    stock = f"stock, N = {full}"
    builders = {stock: partial(copy.deepcopy, model)}
    for form, settings in FORMS.items():
        for size in kept:
            builders[f"{form}, N = {size}"] = partial(_cut, model, size / full, settings, calibration)
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
        "`Mamba2ForCausalLM` with mamba-ssm's chunk scan, random weights and tokens, vocabulary 256; each smaller "
        "model is a cut of the first by `compress`. Training step: bf16 autocast, forward, backward, fused AdamW; "
        "medians of synchronised calls, the models taking turns; in brackets against the stock model. Memory: the most "
        "that torch had allocated for that model. Decoding in bf16 of 128 sequences, 32 tokens each, by `generate` and by "
        "replaying one captured step as a CUDA graph.",
    )


def _cut(
    model: torch.nn.Module, ratio: float, settings: dict[str, object], calibration: dict[str, torch.Tensor]
) -> torch.nn.Module:
    small = copy.deepcopy(model)
    record = compress(small, [calibration], CompreSSMConfig(strategy="fixed", keep_ratio=ratio, **settings))
    if record.outcome != "cut":
        raise RuntimeError(f"nothing was cut: {record.summary()}")
    return small
