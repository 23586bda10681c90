"""Readouts of time-invariant systems fitted to outputs: against numpy's least squares, and where they must stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm.errors import DimensionError
from hf_compressm.systems import OutputMoments, fit_system_readout
from tests.systems.strategies import quick


def random_complex(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def outputs_of(C: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (z @ C.mT).real


def least_squares(z: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    features = np.concatenate([z.real.numpy(), -z.imag.numpy()], axis=1)
    X = np.linalg.lstsq(features, y.numpy(), rcond=None)[0]
    real, imaginary = np.split(X.T, 2, axis=1)
    return real + 1j * imaginary


def test_against_numpy_where_there_is_enough_data() -> None:
    z = random_complex(4000, 5)
    noise = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = outputs_of(random_complex(3, 5, seed=2), z) + noise
    start = random_complex(3, 5, seed=3)
    found = fit_system_readout(start, OutputMoments.of(z[:3000], y[:3000]), OutputMoments.of(z[3000:], y[3000:]))
    expected = torch.from_numpy(least_squares(z, y))
    assert (found - expected).abs().max() < 1e-2 * (start - expected).abs().max()


def test_the_imaginary_part_of_states_that_are_not_circular_counts() -> None:
    """Covariances of `z z^H` alone would not tell these apart."""
    z = random_complex(500, 2)
    z = torch.complex(z.real, 0.3 * z.real + 0.01 * z.imag)
    C = random_complex(1, 2, seed=1)
    y = outputs_of(C, z)
    found = fit_system_readout(
        torch.zeros_like(C), OutputMoments.of(z[:400], y[:400]), OutputMoments.of(z[400:], y[400:])
    )
    assert torch.allclose(outputs_of(found, z), y, atol=1e-4)


def test_systems_side_by_side_are_fitted_each_on_its_own() -> None:
    z, C = random_complex(6, 200, 4), random_complex(6, 1, 4, seed=1)
    y = (z @ C.mT).real + 0.1 * random_complex(6, 200, 1, seed=2).real
    start = random_complex(6, 1, 4, seed=3)
    parts = [OutputMoments.of(z[:, steps], y[:, steps]) for steps in (slice(150), slice(150, None))]
    together = fit_system_readout(start, *parts)
    for number in range(6):
        alone = [OutputMoments.of(z[number, steps], y[number, steps]) for steps in (slice(150), slice(150, None))]
        assert torch.allclose(together[number], fit_system_readout(start[number], *alone), rtol=1e-9, atol=1e-12)


def test_a_readout_that_held_out_steps_like_best_stays() -> None:
    z, C = random_complex(40, 4), random_complex(2, 4, seed=1)
    unlike = OutputMoments.of(z[:10], random_complex(10, 2, seed=2).real)
    assert torch.equal(fit_system_readout(C, unlike, OutputMoments.of(z[10:], outputs_of(C, z[10:]))), C)


def test_moments_are_sums_over_steps() -> None:
    z, y, C = random_complex(3, 50, 4), random_complex(3, 50, 2, seed=1).real, random_complex(3, 2, 4, seed=2)
    whole = OutputMoments.of(z, y)
    parts = OutputMoments.of(z[:, :20], y[:, :20]) + OutputMoments.of(z[:, 20:], y[:, 20:])
    nothing = OutputMoments.zeros((3,), 4, 2, torch.device("cpu"))
    for name in ("features", "cross", "energy"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name))
        assert torch.equal(getattr(whole, name), getattr(nothing.like(whole.flattened()) + nothing, name))
    assert torch.allclose(whole.error(C), (y - (z @ C.mT).real).square().sum((1, 2)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DimensionError, match=r"\(5, 2\) and the outputs \(4, 1\)"):
        OutputMoments.of(random_complex(5, 2), torch.zeros(4, 1))


@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.floats(0, 8),
    st.sampled_from(["usual", "dead state", "twins", "few steps"]),
)
@quick
def test_nothing_is_worse_on_the_steps_that_judge(seed: int, r: int, decades: float, kind: str) -> None:
    """States many decades apart, that never move, that are the same, or that fewer steps show than there are."""
    steps = 3 if kind == "few steps" else 60
    scale = 10 ** torch.linspace(-decades, decades, r, dtype=torch.float64)
    z = random_complex(steps, r, seed=seed) * scale
    if kind == "dead state":
        z[:, 0] = 0
    if kind == "twins" and r > 1:
        z[:, 0] = z[:, 1]
    C = random_complex(2, r, seed=seed + 1) / scale
    y = outputs_of(C, z) + random_complex(steps, 2, seed=seed + 2).real
    start = random_complex(2, r, seed=seed + 3) / scale
    cut = max(1, 2 * steps // 3)
    seen, held_out = OutputMoments.of(z[:cut], y[:cut]), OutputMoments.of(z[cut:], y[cut:])
    found = fit_system_readout(start, seen, held_out)
    assert torch.isfinite(torch.view_as_real(found)).all()
    everything = seen + held_out
    slack = 1e-6 * everything.energy
    assert everything.error(found) <= everything.error(start) + slack
    if kind == "dead state":
        assert torch.allclose(found[:, 0], start[:, 0])
