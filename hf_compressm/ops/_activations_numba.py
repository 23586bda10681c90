r"""
The activations inside kernels, for float32 and float64: the logistic function and the softplus.

Both are made of \\( e^{-|x|} \\), which cannot overflow. What is not finite goes in and out as in torch.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

from ._numba import LOG2_E, exp2

# With "reassoc" LLVM could rewrite what keeps the relative accuracy of small values.
_OPTIONS = {"jit_options": {"fastmath": {"contract"}}, "inline": "never"}
# Where torch's softplus returns its argument.
_SOFTPLUS_THRESHOLD = 20
_TERMS = {numba.float32: 7, numba.float64: 17}
_TYPES = {numba.float32: np.float32, numba.float64: np.float64}


def logistic(x):
    r"""\\( 1 / (1 + e^{-x}) \\) inside a kernel."""
    raise NotImplementedError("logistic is only for compiled kernels.")


@overload(logistic, **_OPTIONS)
def _logistic(x):
    number = _TYPES[x]
    zero, one, scale = number(0), number(1), number(-LOG2_E)

    def compute(x):
        small = exp2(scale * abs(x))
        return (small if x < zero else one) / (one + small)

    return compute


def softplus(x):
    r"""
    \\( \log(1 + e^x) \\) inside a kernel, of small relative error for every x; x itself above 20, as in torch.

    With \\( e = e^{-|x|} \\) and \\( s = e / (2 + e) \le 1/3 \\): \\( \log(1 + e) = 2 \,\text{artanh}(s) \\), a series
    in \\( s^2 \\), cut off below the rounding of the type.
    """
    raise NotImplementedError("softplus is only for compiled kernels.")


@overload(softplus, **_OPTIONS)
def _softplus(x):
    number = _TYPES[x]
    zero, two, scale, threshold = number(0), number(2), number(-LOG2_E), number(_SOFTPLUS_THRESHOLD)
    n_terms = _TERMS[x]
    coefficients = tuple(number(2 / (2 * k + 1)) for k in range(n_terms))
    last = n_terms - 1

    def compute(x):
        small = exp2(scale * abs(x))
        s = small / (two + small)
        square = s * s
        series = coefficients[last]
        for k in range(last - 1, -1, -1):
            series = coefficients[k] + square * series
        return x if x > threshold else (x if x > zero else zero) + s * series

    return compute


def softplus_slope(x):
    """The derivative of [`softplus`] inside a kernel: the logistic function, and 1 above 20, as in torch."""
    raise NotImplementedError("softplus_slope is only for compiled kernels.")


@overload(softplus_slope, **_OPTIONS)
def _softplus_slope(x):
    number = _TYPES[x]
    one, threshold = number(1), number(_SOFTPLUS_THRESHOLD)

    def compute(x):
        return one if x > threshold else logistic(x)

    return compute
