r"""
The delta rule of gated DeltaNet and of Kimi delta attention, readable and fast.

The state of a head is a matrix, \\( S \\) (N x head_dim), that stores values under keys:

\\( S_t = (I - \beta_t k_t e_t^\top) \mathrm{diag}(a_t) S_{t-1} + \beta_t k_t v_t^\top, \quad o_t = S_t^\top q_t \\)

with the erase vector \\( e = k \\) unless another one is given. The decay \\( a \\) is one number a head (gated
DeltaNet) or one for each entry of the key (Kimi delta attention). Norms and scales of q and k belong to the caller.

Sources: Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464);
Kimi Team, 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import ConfigurationError, DimensionError
from ._delta_rule_numba import STEPS, delta_rule_backward, delta_rule_forward
from ._derivatives import is_transformed, needs_graph, plain_gradients
from ._threads import run_units, split_range
from ._validation import compute_dtype, require_shapes


def delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The delta rule as a loop over time, on any device and differentiable any number of times.

    Autograd keeps every state. The arguments `query`, `key`, `value`, `log_decay`, `beta`, `initial_state` and `erase`,
    the results and the errors are those of [`delta_rule`].
    """
    sizes = require_delta_rule(query, key, value, log_decay, beta, initial_state, erase)
    dtype = compute_dtype(query, key, value, log_decay, beta)
    shared = sizes["heads"] // sizes["key_heads"]
    erase = key if erase is None else erase
    query, key, erase = (x.to(dtype).repeat_interleave(shared, dim=2) for x in (query, key, erase))
    value, log_decay, beta = (x.to(dtype) for x in (value, log_decay, beta))
    decay = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).exp()[..., None]
    if initial_state is None:
        initial_state = zero_state(key, value)
    state, outputs = initial_state.to(dtype), [torch.zeros_like(value[:, :0])]
    for t in range(sizes["length"]):
        state = decay[:, t] * state
        stored = torch.einsum("bhnv,bhn->bhv", state, erase[:, t])
        delta = beta[:, t, :, None] * (value[:, t] - stored)
        state = state + key[:, t, :, :, None] * delta[:, :, None]
        outputs.append(torch.einsum("bhnv,bhn->bhv", state, query[:, t])[:, None])
    return torch.cat(outputs, dim=1), state


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    The delta rule as a fused CPU kernel with its own backward pass.

    Time grows in proportion to the size of the state. For the backward pass one state in 16 is kept,
    `batch * heads * length / 16 * N * head_dim` numbers; without gradients none is. float64 arguments are computed in
    float64, everything else in float32, and each gradient has the dtype of its argument. The result does not depend on
    the number of threads.

    Args:
        query (`torch.Tensor` of shape `(batch, length, key_heads, N)`): What reads, after its norm and scale; any
            floating-point dtype.
        key (`torch.Tensor` of shape `(batch, length, key_heads, N)`): What writes, and erases; after its norm.
        value (`torch.Tensor` of shape `(batch, length, heads, head_dim)`): What is written; consecutive heads share a
            key head.
        log_decay (`torch.Tensor` of shape `(batch, length, heads)` or `(batch, length, heads, N)`): Logarithms of the
            decays of a head, or of each of its entries: not positive.
        beta (`torch.Tensor` of shape `(batch, length, heads)`): How much of what is stored under the key is replaced.
        initial_state (`torch.Tensor` of shape `(batch, heads, N, head_dim)`, *optional*): State before the first step;
            zero when unset.
        erase (`torch.Tensor` of shape `(batch, length, key_heads, N)`, *optional*): What erases; `key` when unset.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: o, `(batch, length, heads, head_dim)`, and the state after the last step,
        `(batch, heads, N, head_dim)`, in float32 or float64. Both have derivatives of every kind and order; those that
        the kernel does not know are computed through [`delta_rule_reference`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or the key heads do not divide the heads.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, or not floating-point.
    """
    require_delta_rule(query, key, value, log_decay, beta, initial_state, erase)
    if query.device.type != "cpu":
        raise ConfigurationError(
            f"`delta_rule` runs on the CPU and its arguments are on {query.device}. Use the kernels of fla "
            "(flash-linear-attention) there, or `delta_rule_reference`."
        )
    if is_transformed():
        return delta_rule_reference(query, key, value, log_decay, beta, initial_state, erase)
    dtype = compute_dtype(query, key, value, log_decay, beta)
    initial_state = zero_state(key, value) if initial_state is None else initial_state
    # Conversions happen outside of the function below, so that autograd undoes them.
    arguments = [
        None if x is None else x.to(dtype).contiguous()
        for x in (query, key, value, log_decay, beta, initial_state, erase)
    ]
    return _DeltaRule.apply(torch.is_grad_enabled(), *arguments)


class _DeltaRule(Function):
    """[`delta_rule`] on contiguous tensors of one dtype."""

    @staticmethod
    def forward(ctx, grad_enabled, query, key, value, log_decay, beta, initial_state, erase):
        keep = grad_enabled and any(ctx.needs_input_grad)
        batch, length, heads, head_dim = value.shape
        decay = _decay(log_decay)
        output, final_state = torch.empty_like(value), torch.empty_like(initial_state)
        residual = torch.empty_like(value) if keep else value[:, :0]
        n_chunks = -(-length // STEPS) if keep else 0
        boundaries = value.new_empty(batch, heads, n_chunks, key.shape[-1], head_dim)
        tensors = (query, key, key if erase is None else erase, value, decay, beta, initial_state)
        arrays = _arrays(*tensors, output, residual, final_state, boundaries)
        run_units(delta_rule_forward, [(*arrays, unit) for unit in _units(value)])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, log_decay, beta, initial_state, erase, residual, boundaries)
        return output, final_state

    @staticmethod
    def backward(ctx, grad_output, grad_final_state):
        *arguments, residual, boundaries = ctx.saved_tensors
        if needs_graph(grad_output, grad_final_state):
            erases = arguments[-1] is not None
            grads = plain_gradients(
                delta_rule_reference, arguments if erases else arguments[:-1], (grad_output, grad_final_state)
            )
            return None, *grads, *(() if erases else (None,))
        return None, *_fused_gradients(*arguments, residual, boundaries, grad_output, grad_final_state)


def _fused_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    erase: Tensor | None,
    residual: Tensor,
    boundaries: Tensor,
    grad_output: Tensor | None,
    grad_final_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments by the kernel."""
    heads, shared = value.shape[2], value.shape[2] // key.shape[2]
    decay = _decay(log_decay)
    grad_output = torch.zeros_like(value) if grad_output is None else grad_output.contiguous()
    grad_final_state = torch.zeros_like(initial_state) if grad_final_state is None else grad_final_state.contiguous()
    inputs = (query, key, key if erase is None else erase, decay, beta, residual, boundaries)
    grad_query, grad_key = (key.new_zeros(*key.shape[:2], heads, key.shape[3]) for _ in range(2))
    grad_erase = grad_key if erase is None else torch.zeros_like(grad_key)
    grad_value, grad_log_decay, grad_beta = torch.empty_like(value), torch.zeros_like(decay), torch.zeros_like(beta)
    grad_initial_state = torch.empty_like(initial_state)
    outputs = (grad_query, grad_key, grad_erase, grad_value, grad_log_decay, grad_beta, grad_initial_state)
    arrays = _arrays(*inputs, grad_output, grad_final_state, *outputs)
    run_units(delta_rule_backward, [(*arrays, unit) for unit in _units(value)])
    if shared > 1:
        grad_query, grad_key, grad_erase = (x.unflatten(2, (-1, shared)).sum(3) for x in outputs[:3])
    grad_erase = None if erase is None else grad_erase
    return (
        grad_query, grad_key, grad_value, grad_log_decay.view_as(log_decay), grad_beta, grad_initial_state, grad_erase,
    )  # fmt: skip


def _decay(log_decay: Tensor) -> Tensor:
    """(batch, length, heads, 1 or N) factors."""
    return (log_decay if log_decay.ndim == 4 else log_decay[..., None]).exp()


def _units(value: Tensor) -> list[tuple[int, int]]:
    # Twice as many units as threads even out what other programs take from one core.
    threads = torch.get_num_threads()
    return split_range(value.shape[0] * value.shape[2], 1 if threads == 1 else 2 * threads)


def _arrays(*tensors: Tensor) -> list:
    return [tensor.detach().numpy() for tensor in tensors]


def zero_state(key: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, N, head_dim) zeros in the dtype that a delta rule computes in."""
    batch, _, heads, head_dim = value.shape
    return torch.zeros(batch, heads, key.shape[-1], head_dim, dtype=compute_dtype(key, value), device=value.device)


def require_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    erase: Tensor | None = None,
) -> dict[str, int]:
    """
    The lengths of all axes of a delta rule's arguments.

    Args:
        query, key, value, log_decay, beta, initial_state, erase (`torch.Tensor`): As in [`delta_rule`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or the key heads do not divide the heads.
        [`~errors.ConfigurationError`]: arguments are on different devices, or not floating-point.
    """
    steps, vectors = ("batch", "length", "heads"), ("batch", "length", "key_heads", "N")
    decays = (*steps, "N") if log_decay.ndim == 4 else steps
    optional = {
        "initial_state": (initial_state, ("batch", "heads", "N", "head_dim")),
        "erase": (erase, vectors),
    }
    sizes = require_shapes(
        query=(query, vectors), key=(key, vectors), value=(value, (*steps, "head_dim")), beta=(beta, steps),
        log_decay=(log_decay, decays), **{name: pair for name, pair in optional.items() if pair[0] is not None},
    )  # fmt: skip
    if sizes["heads"] % sizes["key_heads"]:
        raise DimensionError(f"there are {sizes['heads']} heads; {sizes['key_heads']} key heads do not divide them.")
    return sizes
