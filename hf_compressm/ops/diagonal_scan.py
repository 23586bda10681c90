r"""
The recurrence of a linear time-invariant layer with a diagonal state matrix, readable and fast.

\\( h_t = \Lambda h_{t-1} + B u_t, y_t = \mathrm{Re}(C h_t) \\), as in the LRU (Orvieto et al. 2023, arXiv 2303.06349).
The feedthrough belongs to the caller. States are computed piece by piece between the two matrix products and never all
kept: for the backward pass, they are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from ._derivatives import is_transformed, needs_graph, plain_gradients
from ._diagonal_scan_numba import scan_adjoints, scan_states
from ._diagonal_scan_torch import scan_by_products
from ._threads import run_units, split_range
from ._validation import require_shapes

# What one piece of the states may take: they should stay in the cache of a core between two products on a CPU.
_CPU_PIECE_BYTES = 2**20
_DEVICE_PIECE_BYTES = 2**27
_LONGEST_PIECE = 4096


def diagonal_scan_reference(lam: Tensor, x: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """
    All states of `h[t] = lam h[t-1] + x[t]` as a loop over time, on any device, differentiable any number of times.

    The arguments `lam`, `x` and `initial_state`, the result and the errors are those of [`diagonal_scan`].
    """
    _require_scan(lam, x, initial_state)
    dtype = _complex_dtype(lam, x)
    lam, x = lam.to(dtype), x.to(dtype)
    state = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.to(dtype)
    states = []
    for step in x.unbind(1):
        state = lam * state + step
        states.append(state)
    return torch.stack(states, dim=1) if states else x


def diagonal_scan(lam: Tensor, x: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """
    All states of `h[t] = lam h[t-1] + x[t]`: a fused kernel on the CPU, products with powers of lam elsewhere.

    complex128 (or float64) arguments are computed in complex128, everything else in complex64.

    Args:
        lam (`torch.Tensor` of shape `(N,)`): Poles, complex or real.
        x (`torch.Tensor` of shape `(batch, length, N)`): What drives the states, complex or real.
        initial_state (`torch.Tensor` of shape `(batch, N)`, *optional*): The state before the first step; zero when
            unset.

    Returns:
        `torch.Tensor` of shape `(batch, length, N)`: The states, complex, with derivatives of every kind and order.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: arguments are on different devices, or integers.
    """
    _require_scan(lam, x, initial_state)
    dtype = _complex_dtype(lam, x)
    lam, x = lam.to(dtype), x.to(dtype)
    initial_state = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.to(dtype)
    if is_transformed():
        return scan_by_products(lam, x, initial_state)
    states = _DiagonalScan.apply(_planes(lam), _planes(x), _planes(initial_state))
    return torch.complex(states[:, :, 0], states[:, :, 1])


def diagonal_recurrence_reference(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    `h[t] = lam h[t-1] + B u[t]`, `y[t] = Re(C h[t])` as a loop over time that keeps every state.

    The arguments `u`, `lam`, `B`, `C` and `initial_state`, the results and the errors are those of
    [`diagonal_recurrence`].
    """
    _require_recurrence(u, lam, B, C, initial_state)
    dtype = _complex_dtype(u)
    states = diagonal_scan_reference(lam.to(dtype), u.to(dtype) @ B.to(dtype).mT, initial_state)
    y = (states @ C.to(dtype).mT).real.to(u.dtype)
    if u.shape[1] > 0:
        return y, states[:, -1]
    return y, states.new_zeros(u.shape[0], lam.shape[0]) if initial_state is None else initial_state.to(dtype)


def diagonal_recurrence(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    A multi-input, multi-output linear system with diagonal state matrix, applied to a batch of real sequences.

    `h[t] = lam h[t-1] + B u[t]`, `y[t] = Re(C h[t])`. Memory grows with `batch * length * (H_in + H_out)`, and with the
    number of states only through one state in some hundred steps, which the backward pass starts again from. A float64
    input is computed in float64, everything else in float32.

    Args:
        u (`torch.Tensor` of shape `(batch, length, H_in)`): Input, any floating-point dtype.
        lam (`torch.Tensor` of shape `(N,)`): Poles, complex.
        B (`torch.Tensor` of shape `(N, H_in)`): Input matrix, complex.
        C (`torch.Tensor` of shape `(H_out, N)`): Readout, complex.
        initial_state (`torch.Tensor` of shape `(batch, N)`, *optional*): The state before the first step, complex; zero
            when unset.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y, `(batch, length, H_out)`, in the dtype of `u`, and the state after the
        last step, `(batch, N)`, complex64 or complex128. Both have derivatives of every kind and order; those that
        the kernel does not know are computed in plain torch, which keeps all states.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others.
        [`~errors.ConfigurationError`]: arguments are on different devices, or `u` is not real and floating-point.
    """
    _require_recurrence(u, lam, B, C, initial_state)
    dtype = _complex_dtype(u)
    y_dtype = u.dtype
    lam, B, C = lam.to(dtype), B.to(dtype), C.to(dtype)
    if initial_state is None:
        initial_state = lam.new_zeros(u.shape[0], lam.shape[0])
    input_weight = torch.cat([B.real, B.imag])
    output_weight = torch.cat([C.real, -C.imag], dim=1)
    initial = _planes(initial_state.to(dtype))
    arguments = (u.to(dtype.to_real()).contiguous(), _planes(lam), input_weight, output_weight, initial)
    if is_transformed():
        y, final = _plain_recurrence(*arguments)
    else:
        y, final = _DiagonalRecurrence.apply(torch.is_grad_enabled(), *arguments)
    return y.to(y_dtype), torch.complex(final[:, 0], final[:, 1])


class _DiagonalScan(Function):
    """[`diagonal_scan`] on planes: poles (2, N), x (batch, length, 2, N), initial state (batch, 2, N)."""

    @staticmethod
    def forward(ctx, poles, x, initial):
        states = _scan(poles, initial, x.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(poles, x, initial, states)
        return states

    @staticmethod
    def backward(ctx, grad_states):
        poles, x, initial, states = ctx.saved_tensors
        if needs_graph(grad_states):
            return plain_gradients(_plain_states, (poles, x, initial), (grad_states,))
        adjoints = grad_states.clone(memory_format=torch.contiguous_format)
        grad_poles, grad_initial = _adjoint(poles, initial, states, torch.zeros_like(initial), adjoints)
        return grad_poles, adjoints, grad_initial


class _DiagonalRecurrence(Function):
    """[`diagonal_recurrence`] on real tensors: the weights hold real and imaginary parts side by side."""

    @staticmethod
    def forward(ctx, grad_enabled, u, poles, input_weight, output_weight, initial):
        keep = grad_enabled and any(ctx.needs_input_grad)
        n_sequences, steps = _piece_size(u, poles)
        y = u.new_empty(*u.shape[:2], output_weight.shape[0])
        final = torch.empty_like(initial)
        n_pieces = -(-u.shape[1] // steps)
        boundaries = u.new_empty(u.shape[0], n_pieces if keep else 0, *poles.shape)
        for sequences in _ranges(u.shape[0], n_sequences):
            state = initial[sequences]
            for piece, times in enumerate(_ranges(u.shape[1], steps)):
                if keep:
                    boundaries[sequences, piece] = state
                states = _states(u[sequences, times], poles, input_weight, state)
                y[sequences, times] = states.flatten(2) @ output_weight.T
                state = states[:, -1]
            final[sequences] = state
        ctx.steps = (n_sequences, steps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, poles, input_weight, output_weight, initial, boundaries)
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        *arguments, boundaries = ctx.saved_tensors
        if needs_graph(grad_y, grad_final):
            return None, *plain_gradients(_plain_recurrence, arguments, (grad_y, grad_final))
        u, poles, input_weight, output_weight, _ = arguments
        grad_y = u.new_zeros(*u.shape[:2], output_weight.shape[0]) if grad_y is None else grad_y.contiguous()
        # What comes in from behind the last step; piece by piece it becomes the gradient of the initial state.
        grad_initial = u.new_zeros(u.shape[0], *poles.shape) if grad_final is None else grad_final.clone()
        grad_u = torch.empty_like(u)
        grad_poles, grad_input, grad_output = (torch.zeros_like(t) for t in (poles, input_weight, output_weight))
        n_sequences, steps = ctx.steps
        for sequences in _ranges(u.shape[0], n_sequences):
            after = grad_initial[sequences]
            for piece, times in reversed(list(enumerate(_ranges(u.shape[1], steps)))):
                before = boundaries[sequences, piece]
                states = _states(u[sequences, times], poles, input_weight, before)
                adjoints = (grad_y[sequences, times] @ output_weight).unflatten(2, poles.shape)
                grad_output += grad_y[sequences, times].flatten(0, 1).T @ states.flatten(2).flatten(0, 1)
                part, after = _adjoint(poles, before, states, after, adjoints)
                grad_poles += part
                adjoints = adjoints.flatten(2)
                grad_u[sequences, times] = adjoints @ input_weight
                grad_input += adjoints.flatten(0, 1).T @ u[sequences, times].flatten(0, 1)
            grad_initial[sequences] = after
        return None, grad_u, grad_poles, grad_input, grad_output, grad_initial


def _plain_states(poles: Tensor, x: Tensor, initial: Tensor) -> Tensor:
    """What [`_DiagonalScan`] computes, in plain torch."""
    states = scan_by_products(_complex(poles, 0), _complex(x, 2), _complex(initial, 1))
    return torch.stack([states.real, states.imag], dim=2)


def _plain_recurrence(
    u: Tensor, poles: Tensor, input_weight: Tensor, output_weight: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """What [`_DiagonalRecurrence`] computes, in plain torch."""
    states = _plain_states(poles, (u @ input_weight.T).unflatten(2, poles.shape), initial)
    return states.flatten(2) @ output_weight.T, states[:, -1] if u.shape[1] else initial


def _states(u: Tensor, poles: Tensor, input_weight: Tensor, initial: Tensor) -> Tensor:
    """(sequences, steps, 2, N) states of a piece of the input."""
    return _scan(poles, initial, (u @ input_weight.T).unflatten(2, poles.shape))


def _scan(poles: Tensor, initial: Tensor, states: Tensor) -> Tensor:
    """States in the place of what drives them, or new ones."""
    if not _has_kernel(states):
        found = scan_by_products(_complex(poles, 0), _complex(states, 2), _complex(initial, 1))
        return torch.stack([found.real, found.imag], dim=2)
    arrays = [t.detach().contiguous().numpy() for t in (poles, initial)]
    run_units(scan_states, [(*arrays, states.detach().numpy(), s, c) for s, c in _units(states)])
    return states


def _adjoint(poles: Tensor, initial: Tensor, states: Tensor, after: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoints in the place of what drives them; returns the gradients of the poles and of the initial state."""
    if not _has_kernel(states):
        lam = _complex(poles, 0)
        backward_in_time = _complex(adjoints, 2).flip(1)
        backward_in_time[:, 0] += _complex(after, 1)
        found = scan_by_products(lam.conj(), backward_in_time, torch.zeros_like(backward_in_time[:, 0])).flip(1)
        adjoints.copy_(torch.stack([found.real, found.imag], dim=2))
        previous = torch.cat([_complex(initial, 1).unsqueeze(1), _complex(states, 2)[:, :-1]], dim=1)
        return _planes((found * previous.conj()).sum((0, 1))), _planes(lam.conj() * found[:, 0])
    units = _units(states)
    # Sequences add to the same gradient: one copy for each unit.
    grad_poles = poles.new_zeros(len(units), *poles.shape)
    grad_initial = torch.empty_like(initial)
    arrays = [t.detach().contiguous().numpy() for t in (poles, initial, states, after, adjoints)]
    outputs = grad_poles.numpy(), grad_initial.numpy()
    run_units(scan_adjoints, [(*arrays, outputs[0][i], outputs[1], s, c) for i, (s, c) in enumerate(units)])
    return grad_poles.sum(0), grad_initial


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _units(states: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of sequences and of states that different threads can take."""
    n_units = 1 if torch.get_num_threads() == 1 else 2 * torch.get_num_threads()
    sequences = split_range(states.shape[0], n_units)
    columns = split_range(states.shape[-1], min(-(-n_units // max(1, len(sequences))), -(-states.shape[-1] // 64)))
    return [(s, c) for s in sequences for c in columns]


def _piece_size(u: Tensor, poles: Tensor) -> tuple[int, int]:
    """How many sequences, and how many of their steps, are computed at a time."""
    budget = _CPU_PIECE_BYTES * torch.get_num_threads() if u.device.type == "cpu" else _DEVICE_PIECE_BYTES
    n_rows = max(1, budget // (max(1, poles.numel()) * poles.element_size()))
    steps = max(1, min(u.shape[1], n_rows, _LONGEST_PIECE))
    return max(1, n_rows // steps), steps


def _ranges(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _planes(tensor: Tensor) -> Tensor:
    """(..., N) complex to (..., 2, N) real."""
    return torch.stack([tensor.real, tensor.imag], dim=-2)


def _complex(planes: Tensor, axis: int) -> Tensor:
    """The inverse of [`_planes`], for planes along the given axis."""
    return torch.complex(planes.select(axis, 0).contiguous(), planes.select(axis, 1).contiguous())


def _complex_dtype(*tensors: Tensor) -> torch.dtype:
    wide = (torch.float64, torch.complex128)
    return torch.complex128 if any(tensor.dtype in wide for tensor in tensors) else torch.complex64


def _require_scan(lam: Tensor, x: Tensor, initial_state: Tensor | None) -> None:
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "N"))}
    require_shapes(allow_complex=True, lam=(lam, ("N",)), x=(x, ("batch", "length", "N")), **states)


def _require_recurrence(u: Tensor, lam: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    require_shapes(u=(u, ("batch", "length", "inputs")))
    states = {} if initial_state is None else {"initial_state": (initial_state, ("batch", "N"))}
    require_shapes(
        allow_complex=True,
        u=(u, ("batch", "length", "inputs")),
        lam=(lam, ("N",)),
        B=(B, ("N", "inputs")),
        C=(C, ("outputs", "N")),
        **states,
    )
