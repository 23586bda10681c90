"""Single steps from a cached state: those of the scan and the convolution, written in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import (
    causal_convolution_reference,
    causal_convolution_step,
    selective_scan_reference,
    selective_step,
)
from hf_compressm.ops.selective_scan import WORTH_SHARING

# (batch, channels, N): one of each, exact blocks and one more or less, and so many states that threads share them.
SHAPES = [(1, 1, 1), (2, 3, 4), (3, 64, 8), (2, 65, 3), (1, 63, 17), (8, 129, 128)]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def arguments_of(batch: int, channels: int, n_states: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs, reads = (batch, 1, channels), (batch, 1, n_states)
    made = {"u": normal(*inputs), "delta": normal(*inputs), "A": -normal(channels, n_states).exp()}
    made |= {"B": normal(*reads), "C": normal(*reads)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def around_of(batch: int, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: normal(*shape, dtype=dtype) for name, shape in (
        ("D", (channels,)), ("z", (batch, 1, channels)), ("delta_bias", (channels,)),
    )}  # fmt: skip


def require_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0)


def test_the_largest_shape_is_shared() -> None:
    batch, channels, n_states = SHAPES[-1]
    assert batch * channels * n_states >= WORTH_SHARING > 2 * 65 * 3


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_one_step_of_the_scan(shape, dtype, threads) -> None:
    batch, channels, n_states = shape
    arguments, around = arguments_of(*shape, dtype=dtype), around_of(batch, channels, dtype=dtype)
    begin = normal(batch, channels, n_states, dtype=dtype)
    for names in ((), ("D",), ("z",), ("delta_bias",), tuple(around)):
        for soft in (False, True):
            state, given = begin.clone(), {**arguments, **{name: around[name] for name in names}}
            if not soft:
                given |= {name: given[name].abs() for name in ("delta", "delta_bias") if name in given}
            y = selective_step(state, **given, delta_softplus=soft)
            exact = {name: tensor.double() for name, tensor in given.items()}
            expected, after = selective_scan_reference(**exact, initial_state=begin.double(), delta_softplus=soft)
            assert y.dtype == state.dtype == dtype
            require_close(y, expected, TOLERANCES[dtype])
            require_close(state, after, TOLERANCES[dtype])


@dtypes
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (64, 300)], ids=str)
def test_it_is_one_step_of_the_convolution(shape, taps, silu, dtype, threads) -> None:
    torch.manual_seed(0)
    batch, channels = shape
    begin, u = normal(batch, channels, taps, dtype=dtype), normal(batch, 1, channels, dtype=dtype)
    weight, bias = normal(channels, taps, dtype=dtype), normal(channels, dtype=dtype)
    for given in (bias, None):
        state = begin.clone()
        out = causal_convolution_step(state, u, weight, given, silu=silu)
        seen = torch.cat([begin.mT, u], dim=1)
        exact = None if given is None else given.double()
        expected = causal_convolution_reference(seen.double(), weight.double(), exact, silu=silu)[:, -1:]
        assert torch.equal(state, seen[:, -taps:].mT)
        assert out.dtype == dtype
        require_close(out, expected, TOLERANCES[dtype])


def test_arguments_of_other_dtypes_and_with_gaps() -> None:
    shape = (2, 9, 5)
    arguments, state = arguments_of(*shape), normal(*shape, dtype=torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in arguments.items()}
    spread = {name: torch.stack([tensor.float()] * 2, dim=-1)[..., 0] for name, tensor in narrow.items()}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    states = [state.clone(), state.clone()]
    outputs = [selective_step(held, **given) for held, given in zip(states, (narrow, spread))]
    assert torch.equal(*outputs) and torch.equal(*states) and outputs[0].dtype == torch.float32


def test_what_is_not_finite_stays_in_its_channel() -> None:
    arguments, state = arguments_of(2, 66, 4), torch.zeros(2, 66, 4)
    arguments["u"][1, 0, 65] = torch.nan
    y = selective_step(state, **arguments, delta_softplus=True)
    assert not state[1, 65].isfinite().any() and not y[1, 0, 65].isfinite()
    state[1, 65], y[1, 0, 65] = 0, 0
    assert state.isfinite().all() and y.isfinite().all()


def test_autograd_knows_that_the_state_was_written() -> None:
    state, weight = torch.ones(1, 3, 2), torch.ones(1, 3, 2, requires_grad=True)
    product = state * weight
    selective_step(state, **arguments_of(1, 3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        selective_step(torch.ones(1, 3, 2), **arguments_of(1, 3, 2))


def wrong_arguments() -> list[tuple[dict[str, Tensor], type[Exception], str]]:
    two_steps = {name: torch.zeros(2, 2, size) for name, size in (("u", 3), ("delta", 3), ("B", 4), ("C", 4))}
    return [
        ({"u": torch.zeros(2, 1, 4)}, DimensionError, "`u` has shape"),
        ({"z": torch.zeros(1, 1, 3)}, DimensionError, "`z` has shape"),
        (two_steps, DimensionError, "makes one step and the arguments hold 2"),
        ({"B": torch.zeros(2, 1, 4, dtype=torch.int64)}, ConfigurationError, "`B` has dtype torch.int64"),
        ({"A": torch.zeros(3, 4, requires_grad=True)}, ConfigurationError, "`A` needs a gradient"),
        ({"state": torch.zeros(2, 3, 4).bfloat16()}, ConfigurationError, "`state` has dtype torch.bfloat16"),
        ({"state": torch.zeros(2, 4, 3).mT}, ConfigurationError, "writes to a contiguous one"),
        ({"state": torch.zeros(2, 3, 4, device="meta")}, ConfigurationError, "other arguments are on meta"),
    ]


@pytest.mark.parametrize(("change", "error", "message"), wrong_arguments(), ids=lambda part: str(part)[:20])
def test_arguments_that_do_not_fit_change_nothing(change, error, message) -> None:
    arguments = {"state": torch.ones(2, 3, 4), **arguments_of(2, 3, 4), **change}
    before = None if arguments["state"].is_meta else arguments["state"].clone()
    with pytest.raises(error, match=message):
        selective_step(**arguments)
    assert before is None or torch.equal(arguments["state"], before)


def test_a_filter_without_taps_and_another_device_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`weight` has no tap"):
        causal_convolution_step(torch.zeros(1, 3, 0), torch.zeros(1, 1, 3), torch.zeros(3, 0))
    arguments = [torch.zeros(shape, device="meta") for shape in ((1, 3, 2), (1, 1, 3), (3, 2))]
    with pytest.raises(ConfigurationError, match="runs on the CPU and its arguments are on meta"):
        causal_convolution_step(*arguments)
