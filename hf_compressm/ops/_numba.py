r"""
How the CPU kernels are compiled, and the exponential that they share.

A kernel walks along time with a block of [`CHANNEL_BLOCK`] channels side by side. Channels are independent of each
other and lie next to each other in memory, so the innermost loop over them needs no reduction and LLVM turns it into
vector instructions, however few states a channel has. Work arrays hold several quantities as planes of one array:
LLVM then sees that they cannot overlap, which saves a dozen pointer comparisons in front of each inner loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload

CHANNEL_BLOCK = 64
TIME_CHUNK = 64

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# NaN and infinity must reach the loss, where gradient scalers look for them: neither "nnan" nor "ninf" is allowed.
_FAST_MATH = {"contract", "nsz", "reassoc"}
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": _FAST_MATH}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Compile a function on its first call, without the GIL, and keep the machine code on disk where possible.

    What is kept is compiled anew when the kernel's own file changes, not when a file changes that it takes parts from:
    after such an edit, delete `__pycache__`. An installation always writes all files anew.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder is writable: compile in every process.
        return numba.njit(**_OPTIONS)(function)


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """A piece of a kernel. It is inlined before LLVM sees it, so that the sizes of work arrays stay constants."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def exp2(exponent):
    r"""
    \\( 2^x \\) inside a kernel, for any x below the largest exponent of its type; 0 below the smallest.

    With \\( x = i + f, |f| \le 1/2 \\): \\( 2^f \\) is a polynomial, and i is added to the exponent bits. The largest
    relative error is 8e-8 in float32 (minimax polynomial of degree 6) and 3e-16 in float64 (Taylor, degree 13).
    """
    raise NotImplementedError("exp2 is only for compiled kernels.")


@overload(exp2, jit_options={"fastmath": {"contract"}}, inline="never")
def _exp2(exponent):
    return {numba.float32: _exp2_float32, numba.float64: _exp2_float64}[exponent]


def _exp2_float32(exponent):
    # At -127 the exponent bits become zero: the decay of a state that forgets everything is exactly 0.
    x = np.float32(-127.0) if exponent < np.float32(-127.0) else exponent
    whole = np.rint(x)
    f = x - whole
    p = np.float32(0.00133988744) + f * np.float32(0.000153533623)
    p = np.float32(0.00961843736) + f * p
    p = np.float32(0.0555033247) + f * p
    p = np.float32(0.240226479) + f * p
    p = np.float32(0.693147203) + f * p
    p = np.float32(1.0) + f * p
    return np.int32(np.float32(p).view(np.int32) + np.int32(np.int32(whole) << np.int32(23))).view(np.float32)


_TAYLOR = tuple(LN_2**k / math.factorial(k) for k in range(14))


def _exp2_float64(exponent):
    x = -1023.0 if exponent < -1023.0 else exponent
    whole = np.rint(x)
    f = x - whole
    p = _TAYLOR[13]
    for k in range(12, -1, -1):
        p = _TAYLOR[k] + f * p
    return np.int64(np.float64(p).view(np.int64) + (np.int64(whole) << 52)).view(np.float64)
