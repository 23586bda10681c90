"""The fused selective scan against its reference, in value and in every gradient."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mamba import modeling_mamba

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import selective_scan, selective_scan_reference

# (batch, length, channels, N): single steps, exact blocks and chunks, and one more or less than those.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 3, 4),
    (3, 64, 64, 8),
    (2, 65, 65, 3),
    (1, 130, 63, 5),
    (1, 7, 200, 17),
    (5, 3, 16, 256),
]
# Largest error, relative to the largest entry. bfloat16 and float16 are computed in float32 and rounded once.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def random_weights(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-8, 9, x.shape, generator=generator).div(4).to(x.dtype) for x in outputs]


def run(function, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a scan, and the gradients of a random weighted sum of them."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in arguments.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), random_weights(outputs))
    results = {"y": outputs[0], "final_state": outputs[1]}
    return results | {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_the_reference(scan_arguments, shape, dtype, threads) -> None:
    arguments = scan_arguments(*shape, dtype=dtype)
    actual = run(selective_scan, arguments)
    expected = run(selective_scan_reference, {name: tensor.double() for name, tensor in arguments.items()})
    for name, value in actual.items():
        is_state = name == "final_state"
        wanted = (torch.float64 if dtype == torch.float64 else torch.float32) if is_state else dtype
        assert value.dtype == wanted, name
        assert largest_error(value, expected[name]) <= TOLERANCES[wanted], name


def test_reference_gives_the_recurrence_written_out() -> None:
    u, delta = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[0.5], [0.25]]])
    A, B = torch.tensor([[-1.0, -2.0]]), torch.tensor([[[1.0, -1.0], [0.5, 2.0]]])
    C, initial_state = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]]), torch.tensor([[[4.0, 0.0]]])
    h1 = [4 * math.exp(-0.5) + 1.0, -1.0]
    h2 = [h1[0] * math.exp(-0.25) + 0.375, h1[1] * math.exp(-0.5) + 1.5]
    for function in (selective_scan_reference, selective_scan):
        y, state = function(u, delta, A, B, C, initial_state)
        assert y.flatten().tolist() == pytest.approx([h1[0], h2[0] + 2 * h2[1]], rel=1e-6)
        assert state.flatten().tolist() == pytest.approx(h2, rel=1e-6)


def test_gradcheck(scan_arguments) -> None:
    arguments = scan_arguments(2, 3, 3, 2, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(selective_scan, arguments)


def test_matches_the_stock_function_of_transformers(scan_arguments) -> None:
    arguments = scan_arguments(3, 40, 48, 16)
    raw_delta, bias, z = torch.randn(3, 48, 40), torch.randn(48), torch.randn(3, 48, 40)
    inputs = {name: arguments[name].detach() for name in ("u", "A", "B", "C")}
    inputs |= {"raw_delta": raw_delta, "bias": bias, "D": torch.randn(48), "z": z}

    def stock(u, A, B, C, raw_delta, bias, D, z):
        return modeling_mamba.mamba_selective_scan(
            u.mT, raw_delta, A, B.mT, C.mT, D=D, z=z, delta_bias=bias, delta_softplus=True
        )

    def ours(u, A, B, C, raw_delta, bias, D, z):
        y, _ = selective_scan(u, F.softplus(raw_delta.mT + bias), A, B, C)
        return ((y + u * D) * F.silu(z.mT)).mT

    results = []
    for function in (stock, ours):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = function(**leaves)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), *random_weights((y,)))])
    for name, expected, actual in zip(["y", *inputs], *results):
        assert largest_error(actual, expected) < 1e-5, name


def test_strided_arguments_give_the_same_as_contiguous_ones(scan_arguments) -> None:
    arguments = scan_arguments(2, 70, 66, 5)
    expected = run(selective_scan, arguments)
    projection = torch.cat([arguments["B"], arguments["C"]], dim=-1)
    strided = {
        "u": arguments["u"].mT.contiguous().mT,
        "delta": arguments["delta"].mT.contiguous().mT,
        "A": arguments["A"].T.contiguous().T,
        "B": projection[..., :5],
        "C": projection[..., 5:],
        "initial_state": arguments["initial_state"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in strided.items()}
    assert not any(tensor.is_contiguous() for tensor in leaves.values())
    y, final_state = selective_scan(**leaves)
    assert torch.equal(y, expected["y"])
    assert torch.equal(final_state, expected["final_state"])
    # Transposed gradients of the outputs are what a model's own transpositions hand back.
    weights = [weight.mT.contiguous().mT for weight in random_weights((y, final_state))]
    gradients = torch.autograd.grad((y, final_state), list(leaves.values()), weights)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, expected[f"grad_{name}"]), name


AROUND = ("D", "z", "delta_bias")


def mixer_arguments(scan_arguments, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The arguments of a scan and what stands around it in a mixer, with time steps before their softplus."""
    batch, length, channels, _ = shape
    generator = torch.Generator().manual_seed(2)
    normal = lambda *axes: torch.randn(*axes, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    around = {"D": normal(channels), "z": 3 * normal(batch, length, channels), "delta_bias": normal(channels)}
    return {**scan_arguments(*shape, dtype=dtype), **around, "delta": 6 * normal(batch, length, channels)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softplus_skip_and_gate_match_the_reference(scan_arguments, shape, dtype, threads) -> None:
    arguments = mixer_arguments(scan_arguments, *shape, dtype=dtype)
    actual = run(functools.partial(selective_scan, delta_softplus=True), arguments)
    double = {name: tensor.double() for name, tensor in arguments.items()}
    expected = run(functools.partial(selective_scan_reference, delta_softplus=True), double)
    for name, value in actual.items():
        is_state = name == "final_state"
        wanted = (torch.float64 if dtype == torch.float64 else torch.float32) if is_state else dtype
        assert value.dtype == wanted, name
        # Time steps of 20 and decays e^(-100): the exponent of float32 has fewer digits behind the point.
        assert largest_error(value, expected[name]) <= max(TOLERANCES[wanted], 5e-13), name


@pytest.mark.parametrize("softplus", [False, True], ids=["steps", "softplus"])
@pytest.mark.parametrize("given", [*itertools.combinations(AROUND, 1), *itertools.combinations(AROUND, 2)], ids=str)
def test_each_of_them_can_be_left_out(scan_arguments, given, softplus) -> None:
    arguments = mixer_arguments(scan_arguments, 2, 67, 5, 3)
    arguments = {name: tensor for name, tensor in arguments.items() if name not in AROUND or name in given}
    arguments["delta"] = arguments["delta"] if softplus else arguments["delta"].abs() + 3
    actual, expected = (
        run(functools.partial(function, delta_softplus=softplus), arguments)
        for function in (selective_scan, selective_scan_reference)
    )
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert largest_error(value, expected[name]) < 1e-5, name


def test_gradcheck_of_a_mixer(scan_arguments) -> None:
    arguments = mixer_arguments(scan_arguments, 2, 3, 3, 2, dtype=torch.float64)
    names, leaves = list(arguments), [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(
        lambda *tensors: selective_scan(**dict(zip(names, tensors)), delta_softplus=True), leaves
    )


def test_the_output_has_the_dtype_that_input_skip_and_gate_have_together(scan_arguments) -> None:
    arguments = mixer_arguments(scan_arguments, 2, 5, 3, 2, dtype=torch.bfloat16)
    for function in (selective_scan, selective_scan_reference):
        assert function(**arguments)[0].dtype == torch.bfloat16
        assert function(**{**arguments, "D": arguments["D"].float()})[0].dtype == torch.float32


def test_halves_of_one_projection_are_read_where_they_lie(scan_arguments, monkeypatch) -> None:
    arguments = mixer_arguments(scan_arguments, 2, 70, 66, 5)
    expected = run(functools.partial(selective_scan, delta_softplus=True), arguments)
    halves = torch.cat([arguments["u"], arguments["z"]], dim=-1)
    leaves = {**arguments, "u": halves[..., :66], "z": halves[..., 66:]}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    copied = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda self: copied.append(self.shape) or contiguous(self))
    y, final_state = selective_scan(**leaves, delta_softplus=True)
    monkeypatch.undo()
    assert arguments["u"].shape not in copied
    gradients = torch.autograd.grad((y, final_state), list(leaves.values()), random_weights((y, final_state)))
    assert torch.equal(y, expected["y"])
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, expected[f"grad_{name}"]), name


@pytest.mark.parametrize("value", [-1e30, -200.0, -20.0, 19.9, 20.1, 1e4])
def test_time_steps_are_those_of_the_softplus_of_torch(value) -> None:
    """With A = 0 and one step the output is the time step."""
    results = []
    for dtype in (torch.float32, torch.float64):
        delta = torch.full((1, 1, 3), value, dtype=dtype, requires_grad=True)
        ones, A = torch.ones(1, 1, 3, dtype=dtype), torch.zeros(3, 1, dtype=dtype)
        y, _ = selective_scan(ones, delta, A, ones[..., :1], ones[..., :1], delta_softplus=True)
        for out in (y, F.softplus(delta)):
            results.append(torch.stack([out.detach().sum(), *(g.sum() for g in torch.autograd.grad(out.sum(), delta))]))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(results[-2], results[-1], rtol=tolerance, atol=1e-30)


def test_expanded_A_receives_the_sum_of_its_gradients(scan_arguments) -> None:
    arguments = scan_arguments(2, 9, 70, 3)
    row = arguments["A"][:1].clone().requires_grad_()
    y, _ = selective_scan(**{**arguments, "A": row.expand(70, 3)})
    full = row.detach().repeat(70, 1).requires_grad_()
    y_full, _ = selective_scan(**{**arguments, "A": full})
    gradient, gradient_full = (torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((y, row), (y_full, full)))
    torch.testing.assert_close(gradient, gradient_full.sum(0, keepdim=True))


@pytest.mark.parametrize(
    ("used", "wanted"),
    [(0, name) for name in ("u", "delta", "A", "B", "C", "initial_state")]
    + [(1, name) for name in ("u", "delta", "A", "B", "initial_state")],
)
def test_each_gradient_alone_and_of_each_output_alone(scan_arguments, used, wanted) -> None:
    arguments = scan_arguments(2, 67, 5, 3)
    leaf = arguments[wanted].requires_grad_()
    gradients = []
    for function in (selective_scan, selective_scan_reference):
        output = function(**arguments)[used]
        gradients += torch.autograd.grad(output, leaf, random_weights((output,)))
    assert gradients[1].any()
    assert largest_error(*gradients) < 2e-6


def test_final_state_does_not_depend_on_C(scan_arguments) -> None:
    arguments = scan_arguments(2, 67, 5, 3)
    C = arguments["C"].requires_grad_()
    assert not torch.autograd.grad(selective_scan(**arguments)[1].sum(), C)[0].any()


def test_initial_state_defaults_to_zero(scan_arguments) -> None:
    arguments = scan_arguments(2, 6, 5, 3)
    zero = torch.zeros_like(arguments.pop("initial_state"))
    for with_default, with_zero in zip(selective_scan(**arguments), selective_scan(**arguments, initial_state=zero)):
        assert torch.equal(with_default, with_zero)


def test_one_state_in_64_is_kept_for_the_backward_pass_and_none_without_gradients(scan_arguments) -> None:
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None)
    arguments = scan_arguments(2, 640, 64, 8)
    with hooks:
        selective_scan(**{name: tensor.requires_grad_() for name, tensor in arguments.items()})
    inputs = sum(arguments[name].numel() for name in ("u", "delta", "A", "B", "C"))
    # The initial state belongs to the inputs.
    assert sum(kept) == inputs + 2 * 64 * 8 + 2 * 640 * 64 * 8 // 64
    with torch.no_grad():
        assert not any(output.requires_grad for output in selective_scan(**arguments))


def test_second_derivatives_are_those_of_the_plain_loop(scan_arguments) -> None:
    arguments = scan_arguments(1, 3, 2, 2)
    u = arguments["u"].requires_grad_()
    found = []
    for function in (selective_scan, selective_scan_reference):
        (gradient,) = torch.autograd.grad(function(**arguments)[0].square().sum(), u, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), u)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_reach_inside(scan_arguments) -> None:
    arguments = scan_arguments(2, 20, 8, 4)
    for function in (selective_scan, selective_scan_reference):
        plain = function(**arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = function(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_mixed_dtypes_give_each_gradient_in_its_own(scan_arguments) -> None:
    arguments = scan_arguments(2, 9, 4, 3)
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float32)
    arguments = {name: tensor.to(dtype) for (name, tensor), dtype in zip(arguments.items(), dtypes)}
    results = run(selective_scan, arguments)
    assert results["y"].dtype == torch.bfloat16
    assert results["final_state"].dtype == torch.float32
    assert [results[f"grad_{name}"].dtype for name in arguments] == list(dtypes)


# ---- properties


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 140),
    channels=st.integers(1, 130),
    n_states=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_two_halves_with_the_state_carried_over_are_the_whole(batch, length, channels, n_states, share, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, length, channels, generator=generator)
    delta = torch.rand(batch, length, channels, generator=generator)
    A = -torch.rand(channels, n_states, generator=generator) * 5
    B, C = torch.randn(2, batch, length, n_states, generator=generator)
    cut = min(length - 1, 1 + int(share * length))
    whole, final_state = selective_scan(u, delta, A, B, C)
    first, state = selective_scan(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut])
    second, state = selective_scan(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], state)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert torch.equal(state, final_state)


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-20, 20), channels=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_output_is_linear_in_the_input(exponent, channels, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, other = torch.randn(2, 2, 9, channels, generator=generator)
    delta = torch.rand(2, 9, channels, generator=generator)
    A, (B, C) = -torch.rand(channels, 4, generator=generator), torch.randn(2, 2, 9, 4, generator=generator)
    y, other_y, sum_y = (selective_scan(x, delta, A, B, C)[0] for x in (u, other, u + other))
    # A power of two changes no rounding.
    assert torch.equal(selective_scan(2.0**exponent * u, delta, A, B, C)[0], 2.0**exponent * y)
    torch.testing.assert_close(sum_y, y + other_y, rtol=1e-5, atol=1e-5)


def test_zero_time_steps_keep_the_state_exactly(scan_arguments) -> None:
    arguments = scan_arguments(2, 100, 66, 5)
    arguments["delta"] = torch.zeros_like(arguments["delta"])
    y, final_state = selective_scan(**arguments)
    assert torch.equal(final_state, arguments["initial_state"])
    expected = torch.einsum("bdn,bln->bld", arguments["initial_state"], arguments["C"])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_neither_later_steps_nor_other_sequences_nor_channels_have_an_influence(scan_arguments) -> None:
    arguments = scan_arguments(3, 80, 70, 4)
    y, _ = selective_scan(**arguments)
    changed = {name: tensor.clone() for name, tensor in arguments.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][:, 66:] += 1
        changed[name][0] += 1
    changed["u"][..., 65] += 1
    later, _ = selective_scan(**changed)
    kept = [channel for channel in range(70) if channel != 65]
    assert torch.equal(later[1:, :66][..., kept], y[1:, :66][..., kept])
    assert (
        (later[1:, 66:] != y[1:, 66:]).any()
        and (later[0] != y[0]).any()
        and (later[1:, :66, 65] != y[1:, :66, 65]).any()
    )


# ---- extreme values


def test_very_negative_exponents_forget_everything(scan_arguments) -> None:
    arguments = scan_arguments(2, 70, 66, 5)
    arguments["A"] = torch.full_like(arguments["A"], -1e30)
    arguments["delta"] = arguments["delta"] + 0.1
    results = run(selective_scan, arguments)
    now = arguments["delta"] * arguments["u"] * (arguments["B"] * arguments["C"]).sum(-1, keepdim=True)
    torch.testing.assert_close(results["y"], now, rtol=1e-5, atol=1e-5)
    assert all(value.isfinite().all() for value in results.values())
    assert not results["grad_initial_state"].any()


def test_silence_ends_in_an_exact_zero(scan_arguments) -> None:
    # Rounding to nearest would keep the smallest subnormal number alive for ever, and slow.
    arguments = scan_arguments(1, 1400, 3, 2)
    arguments["u"][:, 1:] = 0
    arguments["delta"] = torch.full_like(arguments["delta"], 0.1)
    arguments["A"] = torch.full_like(arguments["A"], -1.0)
    y, final_state = selective_scan(**{name: tensor.requires_grad_() for name, tensor in arguments.items()})
    assert final_state.count_nonzero() == 0 and y[:, :800].abs().min() > 0
    (gradient,) = torch.autograd.grad(y[:, -1].sum(), arguments["initial_state"])
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "initial_state"])
def test_what_is_not_finite_reaches_the_output(scan_arguments, name, value) -> None:
    arguments = scan_arguments(2, 5, 66, 3)
    arguments[name].view(-1)[0] = value
    y, _ = selective_scan(**arguments)
    assert not y[0].isfinite().all()
    assert y[1].isfinite().all()


def test_nan_in_A_reaches_the_output_and_the_gradients(scan_arguments) -> None:
    arguments = scan_arguments(2, 5, 3, 3)
    arguments["A"][0, 0] = math.nan
    results = run(selective_scan, arguments)
    assert results["y"][..., 0].isnan().all() and results["y"][..., 1:].isfinite().all()
    assert results["grad_u"][..., 0].isnan().any() and results["grad_A"][0, 0].isnan()


# ---- edges and errors


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)], ids=str)
@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
def test_empty_axes(scan_arguments, shape, function) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in scan_arguments(*shape).items()}
    y, final_state = function(**arguments)
    assert y.shape == shape[:3] and final_state.shape == (shape[0], *shape[2:])
    assert not y.any()
    if shape[1] == 0:
        assert torch.equal(final_state, arguments["initial_state"])
    (y.sum() + final_state.sum()).backward()
    assert arguments["initial_state"].grad.shape == final_state.shape


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 5)),
        ("delta", (2, 5, 4)),
        ("delta", (2, 4, 3)),
        ("A", (4, 7)),
        ("B", (2, 5, 6)),
        ("C", (2, 5, 6)),
        ("C", (1, 5, 7)),
        ("initial_state", (2, 7, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(scan_arguments, function, name, shape) -> None:
    arguments = scan_arguments(2, 5, 3, 7)
    arguments[name] = torch.zeros(shape)
    with pytest.raises(DimensionError, match=rf"`{name}` has shape \({shape[0]}.*expected \(") as error:
        function(**arguments)
    assert isinstance(error.value, ValueError)


def test_dtypes_and_devices_that_do_not_fit_are_named(scan_arguments) -> None:
    arguments = scan_arguments(2, 5, 3, 7)
    with pytest.raises(ConfigurationError, match="`B` has dtype torch.int64"):
        selective_scan(**{**arguments, "B": arguments["B"].long()})
    with pytest.raises(ConfigurationError, match="`A` is on meta and other arguments are on cpu"):
        selective_scan(**{**arguments, "A": arguments["A"].to("meta")})
    with pytest.raises(ConfigurationError, match="runs on the CPU and its arguments are on meta"):
        selective_scan(**{name: tensor.to("meta") for name, tensor in arguments.items()})
