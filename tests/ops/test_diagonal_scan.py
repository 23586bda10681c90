"""The diagonal recurrence against loops, numpy, scipy, finite differences."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from hf_compressm.errors import CompreSSMError, DimensionError
from hf_compressm.ops import diagonal_recurrence, diagonal_recurrence_reference, diagonal_scan, diagonal_scan_reference
from hf_compressm.ops._diagonal_scan_torch import scan_by_products

# The package's name for the module is that of the function.
scan_module = importlib.import_module("hf_compressm.ops.diagonal_scan")


def make(
    batch: int = 3,
    length: int = 50,
    inputs: int = 4,
    n: int = 6,
    outputs: int = 5,
    dtype: torch.dtype = torch.complex64,
) -> dict[str, Tensor]:
    """Arguments of the recurrence, with poles from almost 0 to almost 1."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.complex128).to(dtype)  # noqa: E731
    radius, phase = torch.rand(2, n, generator=generator, dtype=torch.float64)
    return {
        "u": normal(batch, length, inputs).real.contiguous(),
        "lam": torch.polar(radius**0.1, 6.28 * phase).to(dtype),
        "B": normal(n, inputs),
        "C": normal(outputs, n),
        "initial_state": normal(batch, n),
    }


def gradients(function, arguments: dict[str, Tensor], weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of a weighted sum of both results."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in arguments.items()}
    y, final = function(**leaves)
    ((y * weights[0]).sum() + (final * weights[1]).sum().real).backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


@pytest.fixture(params=[2**20, 64, 1], ids=["one-piece", "pieces", "single-steps"])
def piece_bytes(request, monkeypatch) -> None:
    monkeypatch.setattr(scan_module, "_CPU_PIECE_BYTES", request.param)


@pytest.mark.usefixtures("piece_bytes", "threads")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 50, 4, 6, 5), (1, 300, 1, 130, 2), (5, 1, 2, 1, 1), (2, 0, 2, 3, 2)])
def test_recurrence_and_its_gradients_equal_the_loop(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arguments = make(*shape, dtype=dtype)
    tolerance = {"atol": 2e-3, "rtol": 1e-3} if dtype == torch.complex64 else {"atol": 1e-9, "rtol": 1e-9}
    found, expected = diagonal_recurrence(**arguments), diagonal_recurrence_reference(**arguments)
    torch.testing.assert_close(found, expected, **tolerance)
    weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    torch.testing.assert_close(
        gradients(diagonal_recurrence, arguments, weights),
        gradients(diagonal_recurrence_reference, arguments, weights),
        **tolerance,
    )


@pytest.mark.usefixtures("piece_bytes")
def test_gradients_are_finite_differences() -> None:
    arguments = [value.requires_grad_() for value in make(2, 7, 3, 4, 2, torch.complex128).values()]
    assert torch.autograd.gradcheck(diagonal_recurrence, arguments)
    assert torch.autograd.gradcheck(lambda u, lam, B, C: diagonal_recurrence(u, lam, B, C)[0], arguments[:4])
    assert torch.autograd.gradcheck(lambda u, lam, B, C: diagonal_recurrence(u, lam, B, C)[1], arguments[:4])
    x = torch.randn(2, 7, 4, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal_scan, (arguments[1], x, arguments[4]))


def test_states_equal_scipy_filters(threads: int) -> None:
    lam = torch.tensor([0.9 + 0.3j, -0.5j, 0.999, 0.0], dtype=torch.complex128)
    x = torch.randn(2, 400, 4, dtype=torch.complex128)
    found = diagonal_scan(lam, x)
    for n in range(4):
        expected = scipy.signal.lfilter([1.0], [1.0, -complex(lam[n])], x[:, :, n].numpy(), axis=1)
        np.testing.assert_allclose(found[:, :, n].numpy(), expected, atol=1e-12)


@torch.no_grad()
def test_recurrence_equals_scipy_state_space() -> None:
    arguments = make(1, 200, 3, 5, 2, torch.complex128)
    lam, B, C = (arguments[name].numpy() for name in ("lam", "B", "C"))
    # scipy's state acts one step later: y[t] = C A x[t] + C B u[t].
    real = lambda z: np.block([[z.real, -z.imag], [z.imag, z.real]])  # noqa: E731
    A, readout = real(np.diag(lam)), np.hstack([C.real, -C.imag])
    drive = np.vstack([B.real, B.imag])
    _, expected, _ = scipy.signal.dlsim((A, drive, readout @ A, readout @ drive, 1.0), arguments["u"][0].numpy())
    found, _ = diagonal_recurrence(arguments["u"], *(arguments[name] for name in ("lam", "B", "C")))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1024, 1100])
def test_products_of_powers_equal_the_loop_with_gradients(length: int) -> None:
    arguments = make(2, length, n=5, dtype=torch.complex128)
    x = torch.randn(2, length, 5, dtype=torch.complex128)
    leaves = [t.clone().requires_grad_() for t in (arguments["lam"], x, arguments["initial_state"])]
    found, expected = scan_by_products(*leaves), diagonal_scan_reference(*leaves)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum().real, leaves),
        torch.autograd.grad((expected * weight).sum().real, leaves),
        atol=1e-8,
        rtol=1e-8,
    )


def test_products_of_powers_that_underflow_are_zero() -> None:
    """0.9 ** 1024 is no single-precision number; a long sequence raises it once more."""
    lam = torch.polar(torch.tensor([0.5, 0.9, 0.999]), torch.tensor([0.3, 2.0, 1.0])).requires_grad_()
    x = torch.randn(1, 40 * 1024, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    states = scan_by_products(lam, x, torch.zeros(1, 3, dtype=torch.complex64))
    expected = diagonal_scan(lam.detach(), x, torch.zeros(1, 3, dtype=torch.complex64))
    torch.testing.assert_close(states.detach(), expected, atol=1e-3, rtol=1e-4)
    (gradient,) = torch.autograd.grad(states.abs().sum(), lam)
    assert torch.isfinite(torch.view_as_real(gradient)).all()


def test_other_devices_use_the_products(monkeypatch) -> None:
    arguments = make(2, 70, dtype=torch.complex128)
    weights = torch.randn(2, 70, 5), torch.randn(2, 6, dtype=torch.complex128)
    expected = gradients(diagonal_recurrence, arguments, weights)
    monkeypatch.setattr(scan_module, "_has_kernel", lambda tensor: False)
    monkeypatch.setattr(scan_module, "_CPU_PIECE_BYTES", 2000)
    torch.testing.assert_close(gradients(diagonal_recurrence, arguments, weights), expected)
    x = torch.randn(2, 7, 6, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal_scan, (arguments["lam"].requires_grad_(), x))


def test_half_precision_inputs_are_computed_in_float32() -> None:
    arguments = make()
    expected, _ = diagonal_recurrence(**arguments)
    found, state = diagonal_recurrence(**(arguments | {"u": arguments["u"].bfloat16()}))
    assert found.dtype == torch.bfloat16
    assert state.dtype == torch.complex64
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_memory_for_the_backward_pass_does_not_grow_with_the_states() -> None:
    saved = []
    for n in (4, 400):
        arguments = {name: value.requires_grad_() for name, value in make(1, 4096, 3, n, 3).items()}
        sizes: dict[int, int] = {}

        def record(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            diagonal_recurrence(**arguments)
        saved.append(sum(sizes.values()))
    all_states = 4096 * 400 * 8
    assert saved[1] - saved[0] < all_states / 50


def test_nothing_becomes_slow_when_the_input_falls_silent() -> None:
    # States that decay below the smallest normal number would be many times slower.
    arguments = make(1, 20000, 1, 64, 1)
    arguments["lam"] = torch.full((64,), 0.9, dtype=torch.complex64)
    arguments["u"] = torch.zeros_like(arguments["u"])
    states = diagonal_scan(arguments["lam"], (arguments["u"] @ arguments["B"].real.T), arguments["initial_state"])
    magnitude = torch.view_as_real(states[:, -1]).abs()
    assert ((magnitude == 0) | (magnitude >= torch.finfo(torch.float32).tiny)).all()


def test_nan_reaches_the_output() -> None:
    arguments = make()
    arguments["u"][0, 10, 0] = torch.nan
    y, _ = diagonal_recurrence(**arguments)
    assert y[0, :10].isfinite().all()
    assert y[0, 10:].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("name", ["lam", "B", "C", "initial_state"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    arguments = make()
    arguments[name] = arguments[name][..., :-1]
    with pytest.raises(DimensionError, match=name if name != "lam" else "expected"):
        diagonal_recurrence(**arguments)
    with pytest.raises(CompreSSMError, match="floating-point"):
        diagonal_recurrence(**(make() | {"u": torch.ones(3, 50, 4, dtype=torch.long)}))
