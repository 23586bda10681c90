"""Training step, peak memory and decoding of several models side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .language_models import bf16_step, decoding
from .session import Session, gigabytes, milliseconds, rate

HEADER = ("training step", "peak memory of a step", "tokens / s by `generate`", "tokens / s, replayed single steps")
Figures = dict[str, Any]


def training_steps(
    session: Session,
    builders: dict[Any, Callable[[], torch.nn.Module]],
    batch: dict[str, Tensor],
    repeats: int,
    make_step: Callable[..., Callable[[], None]] = bf16_step,
) -> tuple[dict[Any, torch.nn.Module], dict[Any, Figures]]:
    """
    Build models, and measure a training step of each and the memory that it needs beyond nothing at all.

    Args:
        session (`Session`): Where it runs.
        builders (`dict`): What makes each model, on any device.
        batch (`dict`): What all of them train on.
        repeats (`int`): Timed steps of each, the models taking turns.
        make_step (`Callable`, *optional*): Takes the session, a model and the batch and returns the step.

    Returns:
        `tuple`: The models and the figures, both by name; a model that failed has no entry.
    """
    models, steps, figures = {}, {}, {}
    for name, build in builders.items():

        def prepared(build=build):
            before = session.allocated()
            model = build().to(session.device)
            step = make_step(session, model, batch)
            step()  # moments and kernels are made in the first
            peak = session.peak_bytes(step, before)
            return model, step, {"peak_bytes": peak, "parameters": sum(p.numel() for p in model.parameters())}

        found = session.attempt(f"training step, {name}", prepared)
        if found is not None:
            models[name], steps[name], figures[name] = found
    seconds = session.attempt("training steps", partial(session.medians, list(steps.values()), repeats))
    for name, median in zip(steps, seconds or ()):
        figures[name]["step_seconds"] = median
    return models, figures


def measured(
    session: Session,
    builders: dict[Any, Callable[[], torch.nn.Module]],
    batch: dict[str, Tensor],
    repeats: int,
    prompts: int,
    new: int,
    replay: bool = True,
) -> dict[Any, Figures]:
    """
    Training step, memory and decoding of language models.

    Args:
        session (`Session`): Where it runs.
        builders (`dict`): What makes each model, on any device.
        batch (`dict`): What all of them train on.
        repeats (`int`): Timed steps of each.
        prompts (`int`): Sequences that are decoded at a time; 0 for no decoding.
        new (`int`): Tokens that are decoded for each.
        replay (`bool`, *optional*, defaults to `True`): Whether to decode by a replayed single step as well.
    """
    models, figures = training_steps(session, builders, batch, repeats)
    if prompts:
        vocabulary = int(batch["input_ids"].max()) + 1
        prompt = torch.randint(0, vocabulary, (prompts, 8), generator=torch.Generator().manual_seed(0))
        for model in models.values():
            model.zero_grad()
        for name, speeds in decoding(session, models, prompt.to(session.device), new, new if replay else 0).items():
            figures[name].update(speeds)
    return figures


def cells(figures: Figures | None, reference: Figures | None) -> list[str]:
    """The cells of `HEADER` for one model, beside the reference's."""
    figures, reference = figures or {}, reference or {}
    return [
        milliseconds(figures.get("step_seconds"), reference.get("step_seconds")),
        gigabytes(figures.get("peak_bytes")),
        rate(figures.get("generate"), reference.get("generate")),
        rate(figures.get("replayed"), reference.get("replayed")),
    ]
