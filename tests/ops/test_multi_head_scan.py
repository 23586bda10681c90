"""The multi-head scan against a plain loop, against autograd through it, and against transformers' own."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from hf_compressm.errors import DimensionError
from hf_compressm.ops import multi_head_scan, multi_head_scan_reference
from tests.ops.test_multi_head_gramians import arguments_of

# batch, length, heads, head_dim, groups, N; lengths around the chunk's 64 steps
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 63, 4, 3, 2, 5), (2, 64, 2, 3, 1, 4), (1, 150, 6, 2, 3, 4)]


SCAN = importlib.import_module("hf_compressm.ops.multi_head_scan")


@pytest.fixture(params=["steps", "products"])
def way(request, monkeypatch) -> str:
    """Both ways to scan few states."""
    if request.param == "products":
        monkeypatch.setattr(SCAN, "_FEW_STATES", 0)
    return request.param


def test_few_states_go_step_by_step_where_a_kernel_may_stand(monkeypatch) -> None:
    calls = []
    real = SCAN.selective_scan
    monkeypatch.setattr(SCAN, "selective_scan", lambda *args: calls.append(args[0].shape) or real(*args))
    for n_states, expected in ((16, [(2, 9, 6), (2, 9, 6)]), (17, [])):
        calls.clear()
        multi_head_scan(**arguments_of((2, 9, 4, 3, 2, n_states)))
        assert calls == expected
    arguments = arguments_of((2, 9, 4, 3, 2, 5))
    u = arguments.pop("u")
    _, tangent = torch.func.jvp(lambda u: multi_head_scan(u, **arguments)[0], (u,), (u,))
    assert not calls, "forward-mode differentiation goes through the products"
    torch.testing.assert_close(tangent, multi_head_scan_reference(u, **arguments)[0])


def test_what_is_recorded_goes_through_the_products() -> None:
    """A kernel writes to memory that no recorder sees."""
    arguments = arguments_of((2, 9, 4, 3, 2, 5))
    recorded = make_fx(lambda u: multi_head_scan(u, **arguments)[0])
    u = arguments.pop("u")
    torch.testing.assert_close(recorded(u)(2 * u), multi_head_scan_reference(2 * u, **arguments)[0])


def gradients(outputs: tuple[Tensor, ...], weights: list[Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), arguments)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_loop(way, shape, with_state: bool, dtype, tolerance: float) -> None:
    batch, _, heads, head_dim, _, n_states = shape
    arguments = [tensor.requires_grad_() for tensor in arguments_of(shape, dtype).values()]
    if with_state:
        arguments.append(torch.randn(batch, heads, head_dim, n_states, dtype=dtype, requires_grad=True))
    found, expected = multi_head_scan(*arguments), multi_head_scan_reference(*arguments)
    weights = [torch.randn_like(tensor) for tensor in expected]
    for one, other in zip(
        [*found, *gradients(found, weights, arguments)], [*expected, *gradients(expected, weights, arguments)]
    ):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("length", [20, 100])
def test_it_is_transformers_scan(way, length: int) -> None:
    arguments = arguments_of((2, length, 4, 3, 2, 5), torch.float32)
    state = torch.randn(2, 4, 3, 5)
    y, last = multi_head_scan(**arguments, initial_state=state)
    stock, stock_last = mamba2_chunk_scan(
        arguments["u"], arguments["delta"], arguments["A"], arguments["B"], arguments["C"], chunk_size=32,
        initial_states=state, return_final_states=True,
    )  # fmt: skip
    torch.testing.assert_close(y, stock, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last, stock_last, rtol=1e-3, atol=1e-4)


def test_two_pieces_give_what_the_whole_gives(way) -> None:
    arguments = arguments_of((2, 90, 4, 3, 2, 5))
    y, last = multi_head_scan(**arguments)
    A = arguments.pop("A")
    first, state = multi_head_scan(A=A, **{name: tensor[:, :37] for name, tensor in arguments.items()})
    second, end = multi_head_scan(
        A=A, **{name: tensor[:, 37:] for name, tensor in arguments.items()}, initial_state=state
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), y)
    torch.testing.assert_close(end, last)


def test_no_steps_leave_the_state() -> None:
    arguments, state = arguments_of((2, 0, 4, 3, 2, 5)), torch.randn(2, 4, 3, 5).double()
    for scan in (multi_head_scan, multi_head_scan_reference):
        y, last = scan(**arguments, initial_state=state)
        assert y.shape == (2, 0, 4, 3) and torch.equal(last, state)


def test_strong_decays_and_short_types(way) -> None:
    """States that vanish within a step make neither NaN nor infinity, in values or gradients; bfloat16 is widened."""
    arguments = {name: tensor.bfloat16() for name, tensor in arguments_of((2, 70, 4, 3, 2, 5)).items()}
    arguments["A"] = arguments["A"] * 1e4
    tensors = [tensor.requires_grad_() for tensor in arguments.values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = multi_head_scan(*tensors)
    assert y.dtype == last.dtype == torch.float32
    for gradient in torch.autograd.grad(y.sum() + last.sum(), tensors):
        assert torch.isfinite(gradient).all()
    torch.testing.assert_close(y, multi_head_scan_reference(*tensors)[0], rtol=1e-3, atol=1e-4)


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = arguments_of((2, 5, 4, 3, 2, 5))
    with pytest.raises(DimensionError, match="`C` has shape"):
        multi_head_scan(**{**arguments, "C": arguments["C"][:, :4]})
    with pytest.raises(DimensionError, match="4 heads; 3 groups"):
        odd = torch.zeros(2, 5, 3, 5)
        multi_head_scan(**{**arguments, "B": odd, "C": odd})
