"""Language models of the published shapes, their training step and their decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import make_mamba
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from .session import Session


def make_mamba2(
    state_size: int, hidden_size: int, layers: int, vocabulary: int, chunk_size: int = 256, head_dim: int = 64
) -> Mamba2ForCausalLM:
    """A stock causal Mamba-2 with one group, as the published models have."""
    torch.manual_seed(0)
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            state_size=state_size,
            num_heads=2 * hidden_size // head_dim,
            head_dim=head_dim,
            n_groups=1,
            chunk_size=chunk_size,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def make(family: str, state_size: int, hidden_size: int, layers: int, vocabulary: int, **settings: Any):
    """A stock causal model of the family `"mamba"` or `"mamba2"`, with the same weights at each call."""
    build = {"mamba": make_mamba, "mamba2": make_mamba2}[family]
    # Drawing a hundred million numbers takes a CPU seconds.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return build(state_size, hidden_size=hidden_size, layers=layers, vocabulary=vocabulary, **settings)


def token_batch(session: Session, batch: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens with themselves as labels, on the session's device."""
    tokens = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(session.device)
    return {"input_ids": tokens, "labels": tokens}


def bf16_step(session: Session, model: torch.nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One training step as the Trainer's `bf16=True` makes it: float32 weights, autocast, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(session.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return step


def generation(model: PreTrainedModel, prompt: Tensor, new: int) -> Callable[[], None]:
    """Greedy decoding of `new` tokens by `generate`, as a user starts it."""
    return partial(model.generate, prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)


@torch.no_grad()
def single_step(model: PreTrainedModel, prompt: Tensor) -> Callable[[], Any]:
    """
    The decoding of one token for each prompt, which a CUDA graph replays where there is CUDA.

    What `generate` spends between the kernels, in Python, is far more than a small state saves; a server replays.
    """
    cache = model(prompt, use_cache=True).cache_params
    token = prompt[:, -1:].clone()

    @torch.no_grad()
    def step() -> None:
        token.copy_(model(token, cache_params=cache, use_cache=True).logits[:, -1:].argmax(-1))

    if prompt.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # A graph does not keep alive what it reads and writes.
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> None:
    graph.replay()


def decoding(
    session: Session, models: dict[Any, PreTrainedModel], prompt: Tensor, new: int, replays: int
) -> dict[Any, dict[str, float]]:
    """
    Decoded tokens per second of each model in bf16, by `generate` and by the replayed single step.

    Args:
        session (`Session`): Where it runs.
        models (`dict`): The models by what they are called.
        prompt (`torch.Tensor` of shape `(batch, length)`): What each decoding begins with.
        new (`int`): Tokens that `generate` appends.
        replays (`int`): Single steps of each timed call; 0 for `generate` alone.
    """
    speeds: dict[Any, dict[str, float]] = {name: {} for name in models}
    narrow = {name: copy.deepcopy(model).to(torch.bfloat16).eval() for name, model in models.items()}
    for kind in ("generate", "replayed") if replays else ("generate",):
        calls = {}
        for name, model in narrow.items():
            if kind == "generate":
                calls[name] = generation(model, prompt, new)
            else:
                step = session.attempt(f"replayed decoding, {name}", partial(single_step, model, prompt))
                if step is not None:
                    calls[name] = partial(_repeat, step, replays)
        tokens = len(prompt) * (new if kind == "generate" else replays)
        found = session.attempt(f"decoding by {kind}", partial(session.medians, list(calls.values()), 3, 1))
        for name, seconds in zip(calls, found or ()):
            speeds[name][kind] = tokens / seconds
    return speeds


def _repeat(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()
