"""The only place where discrete time and continuous time differ.

A discrete-time system is `h[t] = A h[t-1] + B u[t]` and its stability region is the open unit disk; a continuous-time
system is `dh/dt = A h + B u` and its stability region is the open left half-plane. The functions here say how far a
pole is inside the region, and what divides the two sides of a Lyapunov equation whose `A` is diagonal.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..errors import ConfigurationError, UnstableSystemError

TimeDomain = Literal["discrete", "continuous"]

# A pole this close to the unit circle counts as on it: 1 - |lam|^2 is then all rounding, and its sign is chance.
_ON_UNIT_CIRCLE = 4 * torch.finfo(torch.float64).eps


def require_time_domain(time_domain: str) -> None:
    """Raise `ConfigurationError` unless the time domain is one that this package knows."""
    if time_domain not in get_args(TimeDomain):
        raise ConfigurationError(f"time_domain is {time_domain!r}; allowed are {list(get_args(TimeDomain))}.")


def stability_margin(lam: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """Distance of every pole to the boundary of the stability region: `1 - |lam|`, or `-Re(lam)` in continuous time.

    Args:
        lam (`torch.Tensor` of shape `(..., N)`): Poles.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Returns:
        `torch.Tensor` of shape `(..., N)`, real: positive where the pole is stable.
    """
    require_time_domain(time_domain)
    return 1 - lam.abs() if time_domain == "discrete" else -lam.real


def stable_poles(lam: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """Mask of the poles that are stable; within 4 eps of the unit circle, a pole counts as unstable."""
    return stability_margin(lam, time_domain) > (_ON_UNIT_CIRCLE if time_domain == "discrete" else 0.0)


def require_stable(lam: torch.Tensor, time_domain: TimeDomain = "discrete") -> None:
    """Raise `UnstableSystemError` naming the index and the value of the least stable pole, unless all are stable."""
    unstable = ~stable_poles(lam, time_domain)
    if not unstable.any():
        return
    margin = stability_margin(lam, time_domain)
    index = tuple(int(i) for i in torch.unravel_index(margin.argmin(), margin.shape))
    pole = complex(lam[index].item())
    if time_domain == "discrete":
        found, allowed = f"|lam| = {abs(pole):.17g}", "|lam| < 1"
    else:
        found, allowed = f"Re(lam) = {pole.real:.17g}", "Re(lam) < 0"
    raise UnstableSystemError(
        f"{int(unstable.sum())} of {lam.numel()} poles are not stable; the worst is lam{list(index)} = {pole:.6g} with "
        f"{found}, allowed is {allowed} in {time_domain} time. An unstable system has no Gramians: leave this layer as "
        f"it is, or check that the right time domain was given."
    )


def lyapunov_denominator(x: torch.Tensor, y: torch.Tensor, time_domain: TimeDomain = "discrete") -> torch.Tensor:
    """`1 - x conj(y)` in discrete time, `-(x + conj(y))` in continuous time, broadcast, to full relative precision.

    With `A = diag(lam)`, entry (i, j) of `P - A P A^H`, or of `-(A P + P A^H)`, is `P_ij` times this number at
    `x = lam_i, y = lam_j`, so it solves both Lyapunov equations one entry at a time.

    Near the unit circle `1 - x conj(y)` cancels: rounding the product first leaves a relative error of
    `eps / (1 - |lam|)`, 1e-12 at `|lam| = 0.9999`, and Hankel singular values of nearly equal poles, square roots of
    small differences of Gramian entries, lose many more digits than that. Nothing is lost with
    `1 - x conj(y) = (1 - |x|^2) + x conj(x - y)`, where neither term is more than twice as large as their sum
    (`tests/systems/test_time_domain.py` compares with rational arithmetic).

    Args:
        x (`torch.Tensor`): Stable poles, complex128.
        y (`torch.Tensor`): Stable poles, complex128, of a shape that broadcasts.
        time_domain (`str`, *optional*, defaults to `"discrete"`): `"discrete"` or `"continuous"`.

    Returns:
        `torch.Tensor` of the broadcast shape, complex128: with a positive real part.
    """
    if time_domain == "continuous":
        return -(x + y.conj())
    return _one_minus_square(x) + x * (x - y).conj()


def _one_minus_square(x: torch.Tensor) -> torch.Tensor:
    """`1 - |x|^2`, rounded only at the end: every product and difference carries its own rounding error along."""
    real_square, real_error = _square_with_error(x.real)
    imag_square, imag_error = _square_with_error(x.imag)
    first, first_error = _difference_with_error(torch.ones_like(real_square), real_square)
    second, second_error = _difference_with_error(first, imag_square)
    return second + (first_error + second_error - real_error - imag_error)


def _square_with_error(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a * a` rounded, and what rounding took from it (Dekker 1971, with the splitting of Veltkamp)."""
    square, shifted = a * a, a * (2.0**27 + 1)
    high = shifted - (shifted - a)
    low = a - high
    return square, ((high * high - square) + 2 * high * low) + low * low


def _difference_with_error(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a - b` rounded, and what rounding took from it (Knuth's two-sum)."""
    difference = a - b
    virtual = difference - a
    return difference, (a - (difference - virtual)) - (b + virtual)
