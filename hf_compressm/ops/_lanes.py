"""How kernels move the channels of a step into a row of lanes and back."""

from __future__ import annotations

import numpy as np

from ._numba import CHANNEL_BLOCK, part


@part
def load_lanes(source, b, t, first_channel, target, plane):
    """Copy up to W neighbouring channels of a step into a row of W lanes, and fill up with zeros."""
    width = source.shape[2] - first_channel
    # A loop of constant length is a few vector instructions. The index is unsigned because a test for negative ones,
    # which numba adds to signed ones, would turn vector loads into gathers.
    if width >= CHANNEL_BLOCK:
        for lane in range(CHANNEL_BLOCK):
            target[plane, lane] = source[b, t, np.uintp(first_channel + lane)]
    else:
        for lane in range(CHANNEL_BLOCK):
            target[plane, lane] = source[b, t, np.uintp(first_channel + lane)] if lane < width else 0.0


@part
def load_row(flat, start, width, target, plane):
    """Copy up to W neighbouring numbers of flat memory into a row of W lanes, and fill up with zeros."""
    if width >= CHANNEL_BLOCK:
        for lane in range(CHANNEL_BLOCK):
            target[plane, lane] = flat[np.uintp(start + lane)]
    else:
        for lane in range(CHANNEL_BLOCK):
            target[plane, lane] = flat[np.uintp(start + lane)] if lane < width else 0.0


@part
def store_lanes(source, plane, target, b, t, first_channel):
    """Copy a row of lanes to the channels it stands for."""
    width = target.shape[2] - first_channel
    if width >= CHANNEL_BLOCK:
        for lane in range(CHANNEL_BLOCK):
            target[b, t, np.uintp(first_channel + lane)] = source[plane, lane]
    else:
        for lane in range(width):
            target[b, t, np.uintp(first_channel + lane)] = source[plane, lane]


@part
def load_state(source, first_channel, state):
    """Copy the states of up to W channels, (channels, N), into the lanes of (N, W)."""
    state[:] = 0.0
    for lane in range(min(CHANNEL_BLOCK, source.shape[0] - first_channel)):
        for n in range(state.shape[0]):
            state[n, lane] = source[first_channel + lane, n]


@part
def store_state(state, target, first_channel):
    """Copy the lanes of (N, W) to the states of the channels, (channels, N)."""
    for lane in range(min(CHANNEL_BLOCK, target.shape[0] - first_channel)):
        for n in range(state.shape[0]):
            target[first_channel + lane, n] = state[n, lane]


@part
def flush_subnormals(state):
    """Set what has decayed below the normal numbers to 0: many processors are slow with subnormal numbers."""
    smallest = np.finfo(state.dtype).tiny
    for n in range(state.shape[0]):
        for lane in range(CHANNEL_BLOCK):
            if abs(state[n, lane]) < smallest:
                state[n, lane] = 0.0
