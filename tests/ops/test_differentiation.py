"""Every kind of derivative of the fast recurrences is that of their references: none is refused, none is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_compressm.ops import (
    causal_convolution,
    causal_convolution_reference,
    channel_systems,
    channel_systems_reference,
    delta_rule,
    delta_rule_reference,
    diagonal_recurrence,
    diagonal_recurrence_reference,
    diagonal_scan,
    diagonal_scan_reference,
    multi_head_scan,
    multi_head_scan_reference,
    selective_scan,
    selective_scan_reference,
)

Scan = Callable[..., Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def poles(*shape: int) -> Tensor:
    return torch.polar(torch.rand(*shape, dtype=torch.float64) * 0.9, normal(*shape))


def first(function: Scan) -> Scan:
    def output(*arguments: Tensor) -> Tensor:
        y = function(*arguments)
        y, state = y if isinstance(y, tuple) else (y, y[:, -1])
        both = torch.cat([torch.cat([t.real, t.imag]).flatten() if t.is_complex() else t.flatten() for t in (y, state)])
        return both.square().sum() + both.sin().sum()

    return output


def cases() -> dict[str, tuple[Scan, Scan, list[Tensor]]]:
    torch.manual_seed(0)
    cmplx = lambda *shape: torch.complex(normal(*shape), normal(*shape))  # noqa: E731
    return {
        "selective_scan": (
            selective_scan, selective_scan_reference,
            [normal(2, 5, 3), normal(2, 5, 3).exp(), -normal(3, 4).exp(), normal(2, 5, 4), normal(2, 5, 4),
             normal(2, 3, 4)],
        ),
        "selective_scan_in_a_mixer": (
            functools.partial(selective_scan, delta_softplus=True),
            functools.partial(selective_scan_reference, delta_softplus=True),
            [normal(2, 5, 3), normal(2, 5, 3), -normal(3, 4).exp(), normal(2, 5, 4), normal(2, 5, 4), normal(2, 3, 4),
             normal(3), normal(2, 5, 3), normal(3)],
        ),
        "causal_convolution": (
            functools.partial(causal_convolution, silu=True),
            functools.partial(causal_convolution_reference, silu=True),
            [normal(2, 5, 3), normal(3, 4), normal(3)],
        ),
        "multi_head_scan": (
            multi_head_scan, multi_head_scan_reference,
            [normal(2, 5, 4, 3), normal(2, 5, 4).exp(), -normal(4).exp(), normal(2, 5, 2, 3), normal(2, 5, 2, 3),
             normal(2, 4, 3, 3)],
        ),
        "delta_rule": (
            delta_rule, delta_rule_reference,
            [normal(2, 5, 2, 3), normal(2, 5, 2, 3), normal(2, 5, 4, 2), -normal(2, 5, 4).exp(), normal(2, 5, 4),
             normal(2, 4, 3, 2)],
        ),
        "delta_rule_per_entry": (
            delta_rule, delta_rule_reference,
            [normal(2, 5, 2, 3), normal(2, 5, 2, 3), normal(2, 5, 2, 2), -normal(2, 5, 2, 3).exp(), normal(2, 5, 2),
             normal(2, 2, 3, 2), normal(2, 5, 2, 3)],
        ),
        "diagonal_scan": (diagonal_scan, diagonal_scan_reference, [poles(3), cmplx(2, 5, 3), cmplx(2, 3)]),
        "diagonal_recurrence": (
            diagonal_recurrence, diagonal_recurrence_reference,
            [normal(2, 5, 3), poles(4), cmplx(4, 3), cmplx(2, 4), cmplx(2, 4)],
        ),
        "channel_systems": (
            channel_systems, channel_systems_reference, [normal(2, 5, 3), poles(3, 4), cmplx(3, 4), cmplx(2, 3, 4)],
        ),
    }  # fmt: skip


def penalty(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    """The gradients of a gradient's size; the first argument makes the second, as a layer's input its time steps."""
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    inputs = list(leaves)
    if inputs[1].shape == inputs[0].shape:
        inputs[1] = inputs[1] * inputs[0].square()
    slopes = torch.autograd.grad(function(*inputs), leaves, create_graph=True)
    size = sum(slope.abs().square().sum() for slope in slopes)
    return list(torch.autograd.grad(size, leaves))


def functional_gradient(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    return list(torch.func.grad(function, argnums=tuple(range(len(arguments))))(*arguments))


def per_sample(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    """Gradients of each sequence, by `vmap` over `grad`; weights are shared."""
    batched = [index for index, tensor in enumerate(arguments) if tensor.shape[0] == 2]

    def one(*tensors: Tensor) -> Tensor:
        return function(*(t.unsqueeze(0) if index in batched else t for index, t in enumerate(tensors)))

    axes = tuple(0 if index in batched else None for index in range(len(arguments)))
    gradient = torch.func.grad(one, argnums=tuple(range(len(arguments))))
    return list(torch.func.vmap(gradient, in_dims=axes)(*arguments))


def tangent(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    tangents = tuple(torch.randn_like(tensor) for tensor in arguments)
    return list(torch.func.jvp(function, tuple(arguments), tangents))


def dual_numbers(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.randn_like(tensor)) for tensor in arguments]
        return list(forward_ad.unpack_dual(function(*duals)))


def batched_gradients(function: Scan, arguments: list[Tensor]) -> list[Tensor]:
    """Rows of a Jacobian at once, by `vmap` over a backward pass whose graph was made outside of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    value = function(*leaves)
    rows = torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype)
    return list(torch.autograd.grad(value, leaves, rows, is_grads_batched=True))


DERIVATIVES = [penalty, functional_gradient, per_sample, tangent, dual_numbers, batched_gradients]


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda derivative: derivative.__name__)
@pytest.mark.parametrize("name", cases())
def test_every_derivative_is_that_of_the_reference(name: str, derivative: Callable) -> None:
    fast, reference, arguments = cases()[name]
    expected = derivative(first(reference), arguments)
    found = derivative(first(fast), arguments)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["selective_scan", "diagonal_scan", "diagonal_recurrence"])
def test_second_derivatives_pass_the_numerical_check(name: str) -> None:
    fast, _, arguments = cases()[name]
    leaves = [tensor[:, :3].clone() if tensor.ndim == 3 and tensor.shape[1] == 5 else tensor for tensor in arguments]
    assert torch.autograd.gradgradcheck(fast, [leaf.clone().requires_grad_() for leaf in leaves])
