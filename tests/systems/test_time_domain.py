"""Stability margins, and the denominators of both Lyapunov equations to the last digit."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from hf_compressm.errors import ConfigurationError, UnstableSystemError
from hf_compressm.systems.time_domain import (
    lyapunov_denominator,
    require_stable,
    require_time_domain,
    stability_margin,
    stable_poles,
)

EPS = torch.finfo(torch.float64).eps


def exact_denominator(x: complex, y: complex) -> complex:
    """`1 - x conj(y)` in rational arithmetic."""
    a, b, c, d = (Fraction(part) for part in (x.real, x.imag, y.real, y.imag))
    return complex(float(1 - (a * c + b * d)), float(-(b * c - a * d)))


def near_unit_poles(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    margin = 10 ** -(14 * torch.rand(count, generator=generator, dtype=torch.float64))
    angle = 1e-3 * torch.randn(count, generator=generator, dtype=torch.float64) + torch.arange(count) % 3
    return torch.polar(1 - margin, angle)


def test_discrete_denominator_is_exact_up_to_the_unit_circle() -> None:
    lam = near_unit_poles(60, seed=0)
    found = lyapunov_denominator(lam[:, None], lam[None, :])
    rows = [[exact_denominator(x, y) for y in lam.tolist()] for x in lam.tolist()]
    expected = torch.tensor(rows, dtype=torch.complex128)
    error = (found - expected).abs() / expected.abs()
    assert error.max() < 8 * EPS
    # The plain formula is what this is for: it must be seen to fail here.
    plain = 1 - lam[:, None] * lam[None, :].conj()
    assert ((plain - expected).abs() / expected.abs()).max() > 1e-4


def test_continuous_denominator() -> None:
    x, y = torch.tensor(-1 + 2j, dtype=torch.complex128), torch.tensor(-3 + 5j, dtype=torch.complex128)
    assert lyapunov_denominator(x, y, "continuous").item() == 4 + 3j


def test_margins() -> None:
    lam = torch.tensor([0.5, 0.6 + 0.8j, -2.0], dtype=torch.complex128)
    assert stability_margin(lam).tolist() == pytest.approx([0.5, 0.0, -1.0])
    assert stability_margin(lam, "continuous").tolist() == pytest.approx([-0.5, -0.6, 2.0])
    assert stable_poles(lam).tolist() == [True, False, False]
    assert stable_poles(lam, "continuous").tolist() == [False, False, True]


def test_a_pole_within_rounding_of_the_unit_circle_is_unstable() -> None:
    assert not stable_poles(torch.tensor([1 - EPS], dtype=torch.float64)).any()
    assert stable_poles(torch.tensor([1 - 16 * EPS], dtype=torch.float64)).all()
    assert not stable_poles(torch.tensor([0.0], dtype=torch.float64), "continuous").any()


@pytest.mark.parametrize(
    ("time_domain", "message"),
    [
        ("discrete", r"2 of 4 poles.*lam\[1, 0\] = 0\+1\.5j.*\|lam\| = 1\.5"),
        ("continuous", r"lam\[0, 0\].*Re\(lam\) = 0\.5"),
    ],
)
def test_the_worst_pole_is_named(time_domain: str, message: str) -> None:
    lam = torch.tensor([[0.5, -1.2], [1.5j, -0.1]], dtype=torch.complex128)
    with pytest.raises(UnstableSystemError, match=message):
        require_stable(lam, time_domain)


def test_unknown_time_domain() -> None:
    with pytest.raises(ConfigurationError, match="'sampled'; allowed are"):
        require_time_domain("sampled")
    with pytest.raises(ConfigurationError):
        stability_margin(torch.zeros(1), "Discrete")
