r"""
CPU kernels of the diagonal scan. They work in place on states whose real and imaginary parts are planes of one array.

Time is the outer loop and the states of one sequence, next to each other in memory, the inner one: every step is a
handful of vector instructions on values that the step before has left in the cache. A kernel call takes a range of
sequences and a range of states, so that independent parts run on several threads.
"""

from __future__ import annotations

import numpy as np

from ._numba import TIME_CHUNK, kernel, part


@part
def flush_subnormals(work, first_plane):
    """Set what has decayed below the normal numbers to 0: many processors are slow with subnormal numbers."""
    smallest = np.finfo(work.dtype).tiny
    for plane in range(first_plane, first_plane + 2):
        for n in range(work.shape[1]):
            if abs(work[plane, n]) < smallest:
                work[plane, n] = 0.0


@kernel
def scan_states(poles, initial, states, sequences, columns):
    """
    `h[t] = lam h[t-1] + x[t]`, written over x.

    Args:
        poles (array of shape `(2, N)`): Real and imaginary part of lam.
        initial (array of shape `(batch, 2, N)`): The state before the first step.
        states (array of shape `(batch, length, 2, N)`): x on entry, h on return.
        sequences (`tuple[int, int]`): First sequence, and one past the last.
        columns (`tuple[int, int]`): First state, and one past the last.
    """
    first, last = columns
    width = last - first
    work = np.empty((4, width), states.dtype)
    work[0] = poles[0, first:last]
    work[1] = poles[1, first:last]
    for b in range(sequences[0], sequences[1]):
        work[2] = initial[b, 0, first:last]
        work[3] = initial[b, 1, first:last]
        for t in range(states.shape[1]):
            step = states[b, t]
            for n in range(width):
                real = work[0, n] * work[2, n] - work[1, n] * work[3, n] + step[0, first + n]
                imag = work[0, n] * work[3, n] + work[1, n] * work[2, n] + step[1, first + n]
                work[2, n] = real
                work[3, n] = imag
                step[0, first + n] = real
                step[1, first + n] = imag
            if t % TIME_CHUNK == 0:
                flush_subnormals(work, 2)


@kernel
def scan_adjoints(poles, initial, states, final, adjoints, grad_poles, grad_initial, sequences, columns):
    """
    `g[t] = x[t] + conj(lam) g[t+1]` from the last step to the first, written over x, and the gradients that g gives.

    Args:
        poles (array of shape `(2, N)`): Real and imaginary part of lam.
        initial (array of shape `(batch, 2, N)`): The state before the first step.
        states (array of shape `(batch, length, 2, N)`): h of every step.
        final (array of shape `(batch, 2, N)`): `conj(lam) g` of the step after the last.
        adjoints (array of shape `(batch, length, 2, N)`): x on entry, g on return.
        grad_poles (array of shape `(2, N)`): `sum g[t] conj(h[t-1])` is added to it.
        grad_initial (array of shape `(batch, 2, N)`): Receives `conj(lam) g[0]`; may be `final` itself.
        sequences (`tuple[int, int]`): First sequence, and one past the last.
        columns (`tuple[int, int]`): First state, and one past the last.
    """
    first, last = columns
    width = last - first
    work = np.empty((6, width), states.dtype)
    work[0] = poles[0, first:last]
    work[1] = poles[1, first:last]
    for b in range(sequences[0], sequences[1]):
        work[2] = final[b, 0, first:last]
        work[3] = final[b, 1, first:last]
        work[4] = 0
        work[5] = 0
        for t in range(states.shape[1] - 1, -1, -1):
            step = adjoints[b, t]
            previous = states[b, t - 1] if t > 0 else initial[b]
            for n in range(width):
                real = work[2, n] + step[0, first + n]
                imag = work[3, n] + step[1, first + n]
                step[0, first + n] = real
                step[1, first + n] = imag
                work[4, n] += real * previous[0, first + n] + imag * previous[1, first + n]
                work[5, n] += imag * previous[0, first + n] - real * previous[1, first + n]
                work[2, n] = work[0, n] * real + work[1, n] * imag
                work[3, n] = work[0, n] * imag - work[1, n] * real
            if t % TIME_CHUNK == 0:
                flush_subnormals(work, 2)
        grad_initial[b, 0, first:last] = work[2]
        grad_initial[b, 1, first:last] = work[3]
        for n in range(width):
            grad_poles[0, first + n] += work[4, n]
            grad_poles[1, first + n] += work[5, n]
