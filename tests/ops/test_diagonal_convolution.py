"""Systems of single channels against loops, torch's FFT, scipy, finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from hf_compressm.errors import DimensionError
from hf_compressm.ops import channel_systems, channel_systems_reference, convolution_kernel


def make(
    batch: int = 3, length: int = 50, channels: int = 4, n: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of the systems, with poles from almost 0 to almost 1."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.complex128)  # noqa: E731
    radius, phase = torch.rand(2, channels, n, generator=generator, dtype=torch.float64)
    return {
        "u": normal(batch, length, channels).real.to(dtype),
        "lam": torch.polar(radius**0.1, 6.28 * phase),
        "C": normal(channels, n),
        "initial_state": normal(batch, channels, n),
    }


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 257])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systems_and_their_gradients_equal_the_loop(length: int, with_state: bool, dtype: torch.dtype) -> None:
    arguments = make(length=length, dtype=dtype)
    if not with_state:
        del arguments["initial_state"]
    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    found, expected = channel_systems(**leaves), channel_systems_reference(**leaves)
    tolerance = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(found, expected, **tolerance)
    weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    total = lambda y, state: (y * weights[0]).sum() + (state * weights[1]).sum().real  # noqa: E731
    torch.testing.assert_close(
        torch.autograd.grad(total(*found), list(leaves.values()), materialize_grads=True),
        torch.autograd.grad(total(*expected), list(leaves.values()), materialize_grads=True),
        atol=tolerance["atol"] * 50,
        rtol=tolerance["rtol"] * 10,
    )


def test_gradients_are_finite_differences() -> None:
    arguments = [value.requires_grad_() for value in make(2, 7, 3, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(channel_systems, arguments)


def test_kernel_is_the_impulse_response_and_the_fourier_transform_of_the_transfer_function() -> None:
    arguments = make(n=5)
    lam, C = 0.8 * arguments["lam"], arguments["C"]
    kernel = convolution_kernel(lam, C, 400)
    for channel in range(4):
        impulse = np.eye(1, 400)[0]
        expected = sum(
            scipy.signal.lfilter([complex(c)], [1, -complex(pole)], impulse)
            for c, pole in zip(C[channel], lam[channel])
        )
        np.testing.assert_allclose(kernel[channel], expected.real, atol=1e-12)
    z = torch.exp(-2j * torch.pi * torch.arange(400, dtype=torch.float64) / 400)
    transfer = (C.unsqueeze(-1) / (1 - lam.unsqueeze(-1) * z)).sum(1)
    mirrored = (C.conj().unsqueeze(-1) / (1 - lam.conj().unsqueeze(-1) * z)).sum(1)
    torch.testing.assert_close(torch.fft.fft(kernel), (transfer + mirrored) / 2, atol=1e-9, rtol=1e-9)


def test_sixteen_thousand_steps_keep_four_digits() -> None:
    lam = torch.polar(torch.tensor([[0.99999, 0.999]], dtype=torch.float64), torch.tensor([[3.0, 0.1]]).double())
    C = torch.ones(1, 2, dtype=torch.complex128)
    u = torch.randn(1, 16384, 1)
    found, state = channel_systems(u, lam, C)
    expected, expected_state = channel_systems_reference(u.double(), lam, C)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (state - expected_state).abs().max() < 1e-4 * expected_state.abs().max()


def test_a_pole_at_zero_has_finite_gradients() -> None:
    arguments = make()
    lam = torch.zeros_like(arguments["lam"]).requires_grad_()
    y, _ = channel_systems(arguments["u"], lam, arguments["C"])
    torch.testing.assert_close(y, arguments["u"] * arguments["C"].sum(1).real.float())
    y.sum().backward()
    assert torch.view_as_real(lam.grad).isfinite().all()


def test_a_state_that_nobody_asks_for_is_not_computed() -> None:
    arguments = make()
    y, state = channel_systems(**arguments, return_state=False)
    assert state is None
    assert torch.equal(y, channel_systems(**arguments)[0])


@pytest.mark.parametrize("name", ["C", "initial_state"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    arguments = make()
    arguments[name] = arguments[name][..., :-1]
    with pytest.raises(DimensionError, match=name):
        channel_systems(**arguments)
