"""Every op gives on a GPU what it gives on a CPU, and the same gradients; skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hf_compressm import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BATCH, LENGTH, CHANNELS, HEADS, HEAD_DIM, GROUPS = 3, 150, 12, 4, 6, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def complex_random(*shape: int, seed: int) -> Tensor:
    return torch.complex(random(*shape, seed=seed), random(*shape, seed=seed + 1)) / shape[-1] ** 0.5


def poles(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    radius, phase = torch.rand(2, *shape, generator=generator)
    return torch.polar(0.7 + 0.29 * radius, 6.28 * phase)


def selective(n: int) -> dict[str, Tensor]:
    return {
        "u": random(BATCH, LENGTH, CHANNELS),
        "delta": 0.2 * random(BATCH, LENGTH, CHANNELS, seed=1).abs() + 0.01,
        "A": -random(CHANNELS, n, seed=2).abs() - 0.1,
        "B": random(BATCH, LENGTH, n, seed=3),
        "C": random(BATCH, LENGTH, n, seed=4),
    }


def multi_head(n: int) -> dict[str, Tensor]:
    return {
        "u": random(BATCH, LENGTH, HEADS, HEAD_DIM),
        "delta": 0.2 * random(BATCH, LENGTH, HEADS, seed=1).abs() + 0.01,
        "A": -random(HEADS, seed=2).abs() - 0.1,
        "B": random(BATCH, LENGTH, GROUPS, n, seed=3),
        "C": random(BATCH, LENGTH, GROUPS, n, seed=4),
    }


def agree(here: Tensor, there: Tensor, tolerance: float = 1e-4) -> None:
    assert there.device.type == "cuda" and there.dtype == here.dtype
    largest = here.abs().max()
    assert torch.isfinite(here).all() and largest > 0
    assert (there.cpu() - here).abs().max() <= tolerance * largest


def both(function: Callable[..., Tensor | Sequence[Tensor]], arguments: dict[str, Tensor], **rest) -> None:
    """Results and gradients of a function on both devices."""
    results = []
    for device in ("cpu", "cuda"):
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in arguments.items()}
        outputs = function(**leaves, **rest)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        loss = sum((output.abs() ** 2).sum() for output in outputs)
        results.append((outputs, torch.autograd.grad(loss, list(leaves.values()))))
    for here, there in zip(results[0][0], results[1][0], strict=True):
        agree(here.detach(), there.detach())
    for here, there in zip(results[0][1], results[1][1], strict=True):
        agree(here, there, 1e-3)


@pytest.mark.parametrize("n", [1, 6, 64])
def test_the_diagonal_scans(n: int) -> None:
    start = complex_random(BATCH, n, seed=40)
    both(ops.diagonal_scan, {"lam": poles(n), "x": complex_random(BATCH, LENGTH, n, seed=10), "initial_state": start})
    system = {"u": random(BATCH, LENGTH, 5), "lam": poles(n), "B": complex_random(n, 5, seed=20)}
    both(ops.diagonal_recurrence, {**system, "C": complex_random(4, n, seed=30), "initial_state": start})


@pytest.mark.parametrize("n", [1, 6, 64])
def test_the_convolutions(n: int) -> None:
    modes = {"lam": poles(CHANNELS, n), "C": complex_random(CHANNELS, n, seed=20)}
    both(ops.channel_systems, {"u": random(BATCH, LENGTH, CHANNELS), **modes})
    agree(ops.convolution_kernel(**modes, length=LENGTH), ops.convolution_kernel(
        **{name: tensor.cuda() for name, tensor in modes.items()}, length=LENGTH
    ))  # fmt: skip


@pytest.mark.parametrize("n", [1, 6, 64])
def test_the_multi_head_scan(n: int) -> None:
    both(ops.multi_head_scan, multi_head(n))


@pytest.mark.parametrize("n", [1, 6, 64])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "make, state, adjoint",
    [
        (selective, ops.state_gramian, ops.adjoint_gramian),
        (multi_head, ops.multi_head_state_gramian, ops.multi_head_adjoint_gramian),
    ],
    ids=["selective", "multi_head"],
)
def test_the_gramians(make, state, adjoint, sampled: bool, n: int) -> None:
    here = make(n)
    there = {name: tensor.cuda() for name, tensor in here.items()}
    times = ops.sample_times(BATCH, LENGTH, 17, torch.Generator().manual_seed(0)) if sampled else None
    for one, other in zip(state(**here, times=times), state(**there, times=times), strict=True):
        agree(one, other)
    results = [
        adjoint(**{name: found[name] for name in ("delta", "A", "C")}, grad_y=found["u"], times=times)
        for found in (here, there)
    ]
    agree(*results)
