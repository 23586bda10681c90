"""The fused convolution against its reference and against torch, in value and in every gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba import modeling_mamba

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import causal_convolution, causal_convolution_reference

# (batch, length, channels, taps): single steps, fewer steps than taps, exact blocks and chunks and one more or less.
SHAPES = [(1, 1, 1, 1), (1, 1, 5, 4), (2, 3, 63, 4), (3, 64, 64, 2), (1, 65, 65, 3), (2, 130, 200, 4), (5, 9, 16, 7)]
# Largest error, relative to the largest entry.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def arguments_of(
    batch: int, length: int, channels: int, taps: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {"u": normal(batch, length, channels), "weight": normal(channels, taps), "bias": normal(channels)}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def run(function, arguments: dict[str, Tensor], silu: bool = True) -> dict[str, Tensor]:
    """The output, and the gradients of a random weighted sum of it."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in arguments.items()}
    out = function(**leaves, silu=silu)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(-8, 9, out.shape, generator=generator).div(4).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), weights)
    return {"out": out} | {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients)}


def stock(u: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    return modeling_mamba.causal_conv1d_fn(u.mT, weight, bias, activation="silu" if silu else None).mT


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_the_reference_and_transformers(shape, dtype, silu, threads) -> None:
    arguments = arguments_of(*shape, dtype=dtype)
    actual = run(causal_convolution, arguments, silu)
    for function in (causal_convolution_reference, stock):
        expected = run(function, {name: tensor.double() for name, tensor in arguments.items()}, silu)
        for name, value in actual.items():
            assert value.dtype == dtype, name
            assert largest_error(value, expected[name]) <= TOLERANCES[dtype], name


def test_the_filter_written_out() -> None:
    u, weight, bias = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    for function in (causal_convolution, causal_convolution_reference):
        assert function(u, weight, bias).flatten().tolist() == [1.5, 12.5, 24.5]
        assert function(u, weight).flatten().tolist() == [1.0, 12.0, 24.0]


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_gradcheck(taps, silu) -> None:
    arguments = [tensor.requires_grad_() for tensor in arguments_of(2, 5, 3, taps, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda u, w, b: causal_convolution(u, w, b, silu), arguments)
    assert torch.autograd.gradcheck(lambda u, w: causal_convolution(u, w, None, silu), arguments[:2])


def test_parts_of_a_projection_and_transposed_arguments_give_the_same() -> None:
    arguments = arguments_of(2, 70, 66, 4)
    expected = run(causal_convolution, arguments)
    whole = torch.cat([torch.randn(2, 70, 3), arguments["u"], torch.randn(2, 70, 9)], dim=-1)
    for u in (whole[..., 3:69], arguments["u"].mT.contiguous().mT):
        leaves = [u.detach().requires_grad_(), arguments["weight"].T.contiguous().T.requires_grad_(), arguments["bias"]]
        assert not leaves[0].is_contiguous()
        out = causal_convolution(*leaves, silu=True)
        assert torch.equal(out, expected["out"])
        weights = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(1)).div(4)
        gradients = torch.autograd.grad(out, leaves[:2], weights.mT.contiguous().mT)
        assert torch.equal(gradients[0], expected["grad_u"]) and torch.equal(gradients[1], expected["grad_weight"])


def test_one_gradient_for_all_steps_is_read_as_it_is() -> None:
    """`sum` hands back one number that stands for all entries."""
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments_of(2, 9, 5, 3).items()}
    gradients = [
        torch.autograd.grad(function(**arguments, silu=True).sum(), list(arguments.values()))
        for function in (causal_convolution, causal_convolution_reference)
    ]
    for actual, expected in zip(*gradients):
        assert largest_error(actual, expected) < 2e-6


def test_nothing_is_kept_but_the_arguments() -> None:
    kept = []
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments_of(2, 640, 64, 4).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        causal_convolution(**arguments, silu=True)
    assert sum(kept) == sum(tensor.numel() for tensor in arguments.values())


def test_neither_later_steps_nor_other_sequences_nor_channels_have_an_influence() -> None:
    arguments = arguments_of(3, 80, 70, 4)
    before = causal_convolution(**arguments, silu=True)
    arguments["u"][:, 66:] += 1
    arguments["u"][0] += 1
    arguments["u"][..., 65] += 1
    after = causal_convolution(**arguments, silu=True)
    kept = [channel for channel in range(70) if channel != 65]
    assert torch.equal(after[1:, :66][..., kept], before[1:, :66][..., kept])
    assert (after[0] != before[0]).any() and (after[1:, 66:] != before[1:, 66:]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_steps_that_see_it(value) -> None:
    arguments = arguments_of(2, 9, 66, 3)
    arguments["u"][0, 2, 65] = value
    out = causal_convolution(**arguments, silu=False)
    assert not out[0, 2:5, 65].isfinite().any()
    out[0, 2:5, 65] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("value", [-1e30, -100.0, 0.0, 100.0, 1e30])
def test_the_silu_of_large_numbers_is_that_of_torch(value) -> None:
    u = torch.full((1, 1, 3), value, requires_grad=True)
    out = causal_convolution(u, torch.ones(3, 1), silu=True)
    expected = F.silu(u)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(x.sum(), u)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)], ids=str)
@pytest.mark.parametrize("function", [causal_convolution, causal_convolution_reference])
def test_empty_axes(shape, function) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments_of(*shape).items()}
    out = function(**arguments, silu=True)
    assert out.shape == shape[:3]
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape and not tensor.grad.any() for tensor in arguments.values())


@pytest.mark.parametrize("function", [causal_convolution, causal_convolution_reference])
def test_arguments_that_do_not_fit_are_named(function) -> None:
    arguments = arguments_of(2, 5, 3, 4)
    for name, shape in (("u", (2, 5)), ("weight", (4, 4)), ("weight", (3,)), ("bias", (4,))):
        with pytest.raises(DimensionError, match=rf"`{name}` has shape"):
            function(**{**arguments, name: torch.zeros(shape)})
    with pytest.raises(ConfigurationError, match="`weight` has no tap"):
        function(arguments["u"], torch.zeros(3, 0))
    with pytest.raises(ConfigurationError, match="`bias` has dtype torch.int64"):
        function(**{**arguments, "bias": torch.zeros(3, dtype=torch.int64)})


def test_another_device_is_refused() -> None:
    arguments = {name: tensor.to("meta") for name, tensor in arguments_of(2, 5, 3, 4).items()}
    with pytest.raises(ConfigurationError, match="runs on the CPU and its arguments are on meta"):
        causal_convolution(**arguments)
