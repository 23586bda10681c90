"""What the kernels are built from."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from hf_compressm.ops import _activations_numba, _numba
from hf_compressm.ops.selective_scan import blocks_to_channels, channels_to_blocks


@_numba.kernel
def exp2_of_all(exponents, results):
    for i in range(exponents.shape[0]):
        results[i] = _numba.exp2(exponents[i])


def exp2(exponents: np.ndarray) -> np.ndarray:
    results = np.empty_like(exponents)
    exp2_of_all(exponents, results)
    return results


@pytest.mark.parametrize(("dtype", "largest_error"), [(np.float32, 8e-8), (np.float64, 3e-16)])
def test_exp2_is_as_accurate_as_documented(dtype, largest_error) -> None:
    exponents = np.concatenate([np.linspace(-125, 0, 1_000_001), -np.logspace(-30, 0, 10_001), [3.5]]).astype(dtype)
    exact = np.exp2(exponents.astype(np.longdouble))
    assert np.abs(exp2(exponents) / exact - 1).max() <= largest_error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_at_its_ends(dtype) -> None:
    exponents = np.array([0.0, -0.0, -2000.0, -np.inf, np.nan, -1.0, -20.0], dtype)
    assert np.array_equal(exp2(exponents), np.array([1, 1, 0, 0, np.nan, 0.5, 2.0**-20], dtype), equal_nan=True)


def test_exp2_is_only_for_kernels() -> None:
    with pytest.raises(NotImplementedError, match="compiled"):
        _numba.exp2(1.0)


def test_kernels_compile_where_no_folder_is_writable(monkeypatch) -> None:
    njit = numba.njit

    def without_cache(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", without_cache)
    assert _numba.kernel(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("channels", [0, 1, 63, 64, 65, 200])
def test_channel_blocks(channels) -> None:
    A = torch.randn(channels, 3)
    blocks = channels_to_blocks(A)
    assert blocks.shape == (-(-channels // 64), 3, 64)
    assert blocks.is_contiguous()
    assert torch.equal(blocks_to_channels(blocks, channels), A)
    assert blocks.count_nonzero() == A.count_nonzero()


@_numba.kernel
def activations_of_all(x, results):
    for i in range(x.shape[0]):
        results[0, i] = _activations_numba.logistic(x[i])
        results[1, i] = _activations_numba.softplus(x[i])
        results[2, i] = _activations_numba.softplus_slope(x[i])


def activations(x: np.ndarray) -> np.ndarray:
    results = np.empty((3, len(x)), x.dtype)
    activations_of_all(x, results)
    return results


@pytest.mark.parametrize(("dtype", "largest_error"), [(np.float32, 5e-6), (np.float64, 1e-14)])
def test_activations_have_a_small_relative_error_everywhere(dtype, largest_error) -> None:
    x = np.concatenate([np.linspace(-80, 80, 100_001), np.logspace(-30, 0, 1001), -np.logspace(-30, 0, 1001)])
    x = x.astype(dtype)
    wide = x.astype(np.longdouble)
    logistic = 1 / (1 + np.exp(-wide))
    softplus = np.where(wide > 20, wide, np.log1p(np.exp(wide)))
    expected = [logistic, softplus, np.where(wide > 20, 1, logistic)]
    for found, exact in zip(activations(x), expected):
        assert np.abs(found / exact - 1).max() <= largest_error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_at_their_ends(dtype) -> None:
    x = np.array([-np.inf, -1e30, 0, 1e30, np.inf, np.nan], dtype)
    half = dtype(0.5)
    expected = [
        [0, 0, half, 1, 1, np.nan],
        [0, 0, np.log(dtype(2)), dtype(1e30), np.inf, np.nan],
        [0, 0, half, 1, 1, np.nan],
    ]
    assert np.allclose(activations(x), np.array(expected, dtype), rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["logistic", "softplus", "softplus_slope"])
def test_activations_are_only_for_kernels(name) -> None:
    with pytest.raises(NotImplementedError, match="compiled"):
        getattr(_activations_numba, name)(1.0)
