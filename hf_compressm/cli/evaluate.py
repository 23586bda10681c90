"""How good a model is on a few batches: perplexity and accuracy, without a library of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch
    from torch import nn


def evaluate(model: nn.Module, batches: Sequence[Mapping[str, Any]], progress: bool = False) -> dict[str, float]:
    """
    Measure a model on batches with labels.

    - A language model (logits of three axes): `perplexity`, the exponential of the mean cross-entropy of all labelled
      tokens, and `accuracy`, the share of them that is the most likely prediction.
    - A classifier (logits of two axes): `accuracy`.

    Args:
        model (`torch.nn.Module`): Returns `logits` for a batch.
        batches (`Sequence[Mapping]`): Inputs with `labels`; those of a causal language model are the tokens themselves,
            with -100 where nothing is to be predicted.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar.

    Returns:
        `dict[str, float]`: The metrics by name; empty where no batch has labels.
    """
    import torch

    from ..architectures import fast_cpu_scan
    from ..compression.measure.model_pass import evaluation_mode

    negative_log_likelihood, right, count = 0.0, 0, 0
    is_language_model = False
    with torch.no_grad(), evaluation_mode(model), fast_cpu_scan():
        for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None if progress else True):
            if "labels" not in batch:
                return {}
            logits, labels = _aligned(model(**batch).logits, batch["labels"])
            is_language_model = batch["labels"].ndim > 1
            wanted = labels != -100
            logits, labels = logits[wanted].double(), labels[wanted]
            negative_log_likelihood += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    if not count:
        return {}
    perplexity = {"perplexity": math.exp(min(negative_log_likelihood / count, 700))} if is_language_model else {}
    return {**perplexity, "accuracy": right / count}


def _aligned(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits beside the labels that they predict: the next token's for a language model, `(n, classes)` and `(n,)`."""
    if labels.ndim == 1:
        return logits, labels
    return logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
