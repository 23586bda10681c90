r"""
The kernels behind [`~ops.delta_rule`]: the recurrence forward in time, and its adjoint backward in time.

The columns of a state have nothing to do with one another, so a block of [`LANES`] of them is walked along time side by
side, and the innermost loop over them becomes vector instructions. One unit of work is a range of (sequence, head)
pairs; all that it writes is its own. Arrays, all C-contiguous and of one float type (float32 or float64):

- `query`, `key`, `erase`: (batch, length, key heads, N); consecutive value heads share a key head;
- `value`, `output`, `residual` and gradients of them: (batch, length, heads, head_dim); `beta`: (batch, length, heads);
- `decay`: (batch, length, heads, 1 or N), a factor from 0 to 1;
- gradients of `query`, `key`, `erase`: (batch, length, heads, N), one a value head;
- states: (batch, heads, N, head_dim);
- `boundaries`: (batch, heads, chunks, N, head_dim), the state before each [`STEPS`] steps.
"""

from __future__ import annotations

import numpy as np

from ._numba import kernel, part

LANES = 64
STEPS = 16

# Planes of the lanes of one time step. In both passes:
_DELTA = 0
# in the forward pass only: what the decayed state has stored under the erase vector, and the output;
_STORED, _OUTPUT = 1, 2
# in the backward pass only.
_RESIDUAL, _GRAD_OUTPUT, _GRAD_DELTA, _GRAD_STORED = 1, 2, 3, 4


@part
def _load(source, first, target, plane):
    """Copy up to W neighbouring entries of a row into a plane of lanes, and fill up with zeros."""
    width = source.shape[0] - first
    if width >= LANES:
        for lane in range(LANES):
            target[plane, lane] = source[np.uintp(first + lane)]
    else:
        for lane in range(LANES):
            target[plane, lane] = source[np.uintp(first + lane)] if lane < width else 0.0


@part
def _store(source, plane, target, first):
    """Copy a plane of lanes to the entries that it stands for."""
    for lane in range(min(LANES, target.shape[0] - first)):
        target[np.uintp(first + lane)] = source[plane, lane]


@part
def _flush_subnormals(state):
    """Set what has decayed below the normal numbers to 0: many processors are slow with subnormal numbers."""
    smallest = np.finfo(state.dtype).tiny
    for n in range(state.shape[0]):
        for lane in range(LANES):
            if abs(state[n, lane]) < smallest:
                state[n, lane] = 0.0


@part
def _add_outer(vector, lanes, plane, state):
    for n in range(state.shape[0]):
        for lane in range(LANES):
            state[n, lane] += vector[n] * lanes[plane, lane]


@part
def _load_decay(decay, row):
    """The decay of every entry of the key, where one number may stand for all."""
    for n in range(row.shape[0]):
        row[n] = decay[n] if decay.shape[0] > 1 else decay[0]


@kernel
def delta_rule_forward(
    query, key, erase, value, decay, beta, initial_state, output, residual, final_state, boundaries, units
):  # fmt: skip
    r"""
    \\( S_t = (I - \beta_t k_t e_t^\top) \mathrm{diag}(a_t) S_{t-1} + \beta_t k_t v_t^\top, o_t = S_t^\top q_t \\).

    `residual` is \\( v_t - S^\top e_t \\) with the decayed state. `boundaries` and `residual` may have no steps: then
    they are not kept.
    """
    length, heads, head_dim = value.shape[1], value.shape[2], value.shape[3]
    n_states = key.shape[3]
    shared = heads // key.shape[2]
    keep = boundaries.shape[2] > 0
    state = np.empty((n_states, LANES), value.dtype)
    lanes = np.empty((3, LANES), value.dtype)
    factor = np.empty(n_states, value.dtype)
    for unit in range(units[0], units[1]):
        b, h = unit // heads, unit % heads
        g = h // shared
        for first in range(0, head_dim, LANES):
            for n in range(n_states):
                _load(initial_state[b, h, n], first, state, n)
            for lane in range(LANES):
                lanes[_DELTA, lane] = 0.0
            for t in range(length):
                # What a step writes is added when the next step walks through the state anyway.
                before = key[b, max(t - 1, 0), g]
                if t % STEPS == 0:
                    _add_outer(before, lanes, _DELTA, state)
                    _flush_subnormals(state)
                    for lane in range(LANES):
                        lanes[_DELTA, lane] = 0.0
                    for n in range(n_states if keep else 0):
                        _store(state, n, boundaries[b, h, t // STEPS, n], first)
                _load_decay(decay[b, t, h], factor)
                lanes[_STORED] = lanes[_OUTPUT] = 0.0
                q, k, e = query[b, t, g], key[b, t, g], erase[b, t, g]
                product = value.dtype.type(0)
                for n in range(n_states):
                    product += q[n] * k[n]
                    a_n, k_n, q_n, e_n = factor[n], before[n], q[n], e[n]
                    for lane in range(LANES):
                        s = a_n * (state[n, lane] + k_n * lanes[_DELTA, lane])
                        state[n, lane] = s
                        lanes[_STORED, lane] += e_n * s
                        lanes[_OUTPUT, lane] += q_n * s
                strength = beta[b, t, h]
                _load(value[b, t, h], first, lanes, _DELTA)
                for lane in range(LANES):
                    lanes[_DELTA, lane] -= lanes[_STORED, lane]
                if keep:
                    _store(lanes, _DELTA, residual[b, t, h], first)
                for lane in range(LANES):
                    lanes[_DELTA, lane] *= strength
                    lanes[_OUTPUT, lane] += product * lanes[_DELTA, lane]
                _store(lanes, _OUTPUT, output[b, t, h], first)
            if length > 0:
                _add_outer(key[b, length - 1, g], lanes, _DELTA, state)
            for n in range(n_states):
                _store(state, n, final_state[b, h, n], first)


@part
def _recompute(key, decay, beta, residual, start, steps, first, factor, lanes, boundary, history):
    """The decayed states of a chunk's steps, from the state before it: `history`, (steps, N, W)."""
    for t in range(steps):
        _load_decay(decay[start + t], factor)
        if t == 0:
            for n in range(history.shape[1]):
                _load(boundary[n], first, history[0], n)
                for lane in range(LANES):
                    history[0, n, lane] *= factor[n]
        else:
            k, strength = key[start + t - 1], beta[start + t - 1]
            _load(residual[start + t - 1], first, lanes, _DELTA)
            for n in range(history.shape[1]):
                k_n = strength * k[n]
                for lane in range(LANES):
                    history[t, n, lane] = factor[n] * (history[t - 1, n, lane] + k_n * lanes[_DELTA, lane])


@part
def _step_back(q, k, e, factor, strength, decayed, adjoint, lanes, grad_q, grad_k, grad_e, grad_log_decay):
    """
    Take the adjoint of the state after a step to that of the state before it, and add what the vectors receive.

    The lanes hold the step's residual and the output's gradient; they end with the gradient of the value. Returns the
    gradient of beta.
    """
    written = lanes.dtype.type(0)
    for lane in range(LANES):
        lanes[_DELTA, lane] = strength * lanes[_RESIDUAL, lane]
        lanes[_GRAD_DELTA, lane] = 0.0
        written += lanes[_DELTA, lane] * lanes[_GRAD_OUTPUT, lane]
    for n in range(adjoint.shape[0]):
        q_n, k_n = q[n], k[n]
        sum_q = sum_k = lanes.dtype.type(0)
        for lane in range(LANES):
            adj = adjoint[n, lane] + q_n * lanes[_GRAD_OUTPUT, lane]
            adjoint[n, lane] = adj
            lanes[_GRAD_DELTA, lane] += k_n * adj
            sum_k += adj * lanes[_DELTA, lane]
            sum_q += decayed[n, lane] * lanes[_GRAD_OUTPUT, lane]
        grad_k[n] += sum_k
        grad_q[n] += sum_q + k_n * written
    grad_strength = lanes.dtype.type(0)
    for lane in range(LANES):
        grad_strength += lanes[_GRAD_DELTA, lane] * lanes[_RESIDUAL, lane]
        lanes[_GRAD_DELTA, lane] *= strength
        lanes[_GRAD_STORED, lane] = -lanes[_GRAD_DELTA, lane]
    for n in range(adjoint.shape[0]):
        e_n, a_n = e[n], factor[n]
        sum_e = sum_a = lanes.dtype.type(0)
        for lane in range(LANES):
            adj = adjoint[n, lane] + e_n * lanes[_GRAD_STORED, lane]
            sum_e += decayed[n, lane] * lanes[_GRAD_STORED, lane]
            # The derivative of the decayed state with respect to the logarithm of its decay is itself.
            sum_a += decayed[n, lane] * adj
            adjoint[n, lane] = a_n * adj
        grad_e[n] += sum_e
        grad_log_decay[np.uintp(n if grad_log_decay.shape[0] > 1 else 0)] += sum_a
    return grad_strength


@kernel
def delta_rule_backward(
    query, key, erase, decay, beta, residual, boundaries, grad_output, grad_final_state,
    grad_query, grad_key, grad_erase, grad_value, grad_log_decay, grad_beta, grad_initial_state, units,
):  # fmt: skip
    """
    The gradient of [`delta_rule_forward`], chunk by chunk from the end.

    Added to: `grad_query`, `grad_key`, `grad_erase`, `grad_log_decay` and `grad_beta`, one a value head. `grad_erase`
    may be `grad_key`.
    """
    length, heads, head_dim = residual.shape[1], residual.shape[2], residual.shape[3]
    n_states = key.shape[3]
    shared = heads // key.shape[2]
    adjoint = np.empty((n_states, LANES), residual.dtype)
    history = np.empty((STEPS, n_states, LANES), residual.dtype)
    lanes = np.empty((5, LANES), residual.dtype)
    factor = np.empty(n_states, residual.dtype)
    for unit in range(units[0], units[1]):
        b, h = unit // heads, unit % heads
        g = h // shared
        for first in range(0, head_dim, LANES):
            for n in range(n_states):
                _load(grad_final_state[b, h, n], first, adjoint, n)
            for chunk in range(boundaries.shape[2] - 1, -1, -1):
                start = chunk * STEPS
                steps = min(STEPS, length - start)
                _flush_subnormals(adjoint)
                _recompute(
                    key[b, :, g], decay[b, :, h], beta[b, :, h], residual[b, :, h], start, steps, first, factor,
                    lanes, boundaries[b, h, chunk], history,
                )  # fmt: skip
                for t in range(start + steps - 1, start - 1, -1):
                    _load(residual[b, t, h], first, lanes, _RESIDUAL)
                    _load(grad_output[b, t, h], first, lanes, _GRAD_OUTPUT)
                    _load_decay(decay[b, t, h], factor)
                    grad_beta[b, t, h] += _step_back(
                        query[b, t, g], key[b, t, g], erase[b, t, g], factor, beta[b, t, h], history[t - start],
                        adjoint, lanes, grad_query[b, t, h], grad_key[b, t, h], grad_erase[b, t, h],
                        grad_log_decay[b, t, h],
                    )  # fmt: skip
                    _store(lanes, _GRAD_DELTA, grad_value[b, t, h], first)
            for n in range(n_states):
                _store(adjoint, n, grad_initial_state[b, h, n], first)
