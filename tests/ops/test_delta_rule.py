"""The delta rule against a plain loop, against autograd through it, and against transformers' own functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import delta_rule, delta_rule_reference
from tests.ops.test_delta_rule_gramians import arguments_of

# batch, length, key heads, heads, N, head_dim; lengths around a chunk's 16 steps, head sizes around a block's 64 lanes
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 15, 2, 4, 3, 5), (2, 16, 1, 3, 4, 64), (1, 50, 3, 3, 7, 70)]


def gradients(outputs: tuple[Tensor, ...], weights: list[Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), arguments)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm().clamp_min(torch.finfo(other.dtype).tiny))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("more", [(), ("initial_state",), ("erase",), ("initial_state", "erase")], ids=str)
@pytest.mark.parametrize("per_entry", [False, True], ids=["decay-a-head", "decay-an-entry"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_loop(shape, per_entry, more, dtype, tolerance, threads) -> None:
    batch, _, _, heads, n_states, head_dim = shape
    arguments = arguments_of(shape, per_entry, "erase" in more, dtype)
    if "initial_state" in more:
        arguments["initial_state"] = torch.randn(batch, heads, n_states, head_dim, dtype=dtype)
    tensors = [tensor.requires_grad_() for tensor in arguments.values()]
    found, expected = delta_rule(**arguments), delta_rule_reference(**arguments)
    weights = [torch.randn_like(tensor) for tensor in expected]
    for one, other in zip(
        [*found, *gradients(found, weights, tensors)], [*expected, *gradients(expected, weights, tensors)]
    ):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        assert relative(one, other) <= tolerance
    with torch.no_grad():
        for one, other in zip(delta_rule(**arguments), found):
            assert torch.equal(one, other)


@pytest.mark.parametrize("per_entry", [False, True], ids=["decay-a-head", "decay-an-entry"])
def test_the_numerical_derivative_is_the_gradient(per_entry: bool) -> None:
    arguments = arguments_of((1, 18, 1, 2, 3, 2), per_entry, erases=True)
    names = list(arguments)
    tensors = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(lambda *given: delta_rule(**dict(zip(names, given))), tensors)


@pytest.mark.parametrize("heads", [2, 4])
def test_it_is_transformers_gated_delta_rule(heads: int) -> None:
    arguments = arguments_of((2, 100, 2, heads, 8, 5), dtype=torch.float32)
    state = torch.randn(2, heads, 8, 5)
    arguments["query"] = arguments["query"] * 8**-0.5
    output, last = delta_rule(**arguments, initial_state=state)
    query, key = (arguments[name].repeat_interleave(heads // 2, dim=2) for name in ("query", "key"))
    stock, stock_last = torch_chunk_gated_delta_rule(
        query * 8**0.5, key, arguments["value"], g=arguments["log_decay"], beta=arguments["beta"],
        initial_state=state, output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(output, stock, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, stock_last, rtol=1e-4, atol=1e-5)


def test_it_is_transformers_kimi_delta_attention() -> None:
    arguments = arguments_of((2, 70, 2, 2, 8, 8), per_entry=True, dtype=torch.float32)
    arguments["query"] = arguments["query"] * 8**-0.5
    output, last = delta_rule(**arguments)
    stock, stock_last = chunk_kimi_delta_attention(
        arguments["query"] * 8**0.5, arguments["key"], arguments["value"], g=arguments["log_decay"],
        beta=arguments["beta"], output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(output, stock, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, stock_last, rtol=1e-4, atol=1e-5)


def test_two_pieces_give_what_the_whole_gives() -> None:
    arguments = arguments_of((2, 45, 1, 2, 5, 3))
    output, last = delta_rule(**arguments)
    first, state = delta_rule(**{name: tensor[:, :20] for name, tensor in arguments.items()})
    second, end = delta_rule(**{name: tensor[:, 20:] for name, tensor in arguments.items()}, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_no_steps_leave_the_state() -> None:
    arguments, state = arguments_of((2, 0, 1, 2, 5, 3)), torch.randn(2, 2, 5, 3).double().requires_grad_()
    for function in (delta_rule, delta_rule_reference):
        output, last = function(**arguments, initial_state=state)
        assert output.shape == (2, 0, 2, 3) and torch.equal(last, state)
        assert torch.equal(torch.autograd.grad(last.sum(), state)[0], torch.ones_like(state))


@pytest.mark.parametrize("used", [0, 1], ids=["output", "last-state"])
def test_one_of_the_results_may_go_unused(used: int) -> None:
    arguments = arguments_of((2, 20, 1, 2, 3, 4))
    tensors = [tensor.requires_grad_() for tensor in arguments.values()]
    found, expected = (
        torch.autograd.grad(function(**arguments)[used].sum(), tensors, allow_unused=True, materialize_grads=True)
        for function in (delta_rule, delta_rule_reference)
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_an_argument_that_is_both_key_and_query() -> None:
    arguments = arguments_of((2, 20, 1, 2, 3, 4))
    key = arguments["key"].requires_grad_()
    found, expected = (
        torch.autograd.grad(function(**{**arguments, "query": key, "erase": key})[0].sum(), key)[0]
        for function in (delta_rule, delta_rule_reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("per_entry", [False, True])
def test_strong_decays_and_short_types(per_entry: bool) -> None:
    """States that vanish within a step make neither NaN nor infinity; bfloat16 is widened, and gradients go back."""
    arguments = arguments_of((2, 70, 2, 4, 5, 3), per_entry, strength=1e4, dtype=torch.bfloat16)
    tensors = [tensor.requires_grad_() for tensor in arguments.values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, last = delta_rule(**arguments)
    assert output.dtype == last.dtype == torch.float32
    for gradient in torch.autograd.grad(output.sum() + last.sum(), tensors):
        assert torch.isfinite(gradient).all() and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(output, delta_rule_reference(**arguments)[0], rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_reaches_the_output() -> None:
    arguments = arguments_of((1, 5, 1, 1, 3, 2), dtype=torch.float32)
    arguments["value"][0, 2] = torch.nan
    output, last = delta_rule(**arguments)
    assert torch.isfinite(output[0, :2]).all() and output[0, 2:].isnan().all() and last.isnan().all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = arguments_of((2, 5, 2, 4, 3, 2))
    with pytest.raises(DimensionError, match="`query` has shape|`key` has shape"):
        delta_rule(**{**arguments, "query": arguments["query"][..., :2]})
    with pytest.raises(DimensionError, match="4 heads; 3 key heads"):
        three = torch.zeros(2, 5, 3, 3).double()
        delta_rule(**{**arguments, "query": three, "key": three})
    with pytest.raises(ConfigurationError, match="is on|on meta"):
        delta_rule(**{name: tensor.to("meta") for name, tensor in arguments.items()})
