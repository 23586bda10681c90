r"""
One step of the selective scan from a cached state, as a model takes it for each token that it generates.

The recurrence is that of [`~ops.selective_scan`], where its source is; the scan of one step from an initial state is
the reference.
"""

from __future__ import annotations

from torch import Tensor

from ._numba import CHANNEL_BLOCK
from ._selective_step_numba import step_forward
from ._threads import run_units
from ._validation import require_step
from .selective_scan import WORTH_SHARING, as_arrays, divide_work


def selective_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    r"""
    \\( h \leftarrow e^{\Delta A} h + \Delta u B, y = C^\top h \\), the state written in place, by one CPU kernel.

    It has no derivative; [`~ops.selective_scan`] with an initial state has.

    Args:
        state (`torch.Tensor` of shape `(batch, channels, N)`): State before the step, and after the call that after it;
            contiguous, float32 or float64. All is computed in its dtype.
        u (`torch.Tensor` of shape `(batch, 1, channels)`): Input, any floating-point dtype.
        delta (`torch.Tensor` of shape `(batch, 1, channels)`): Time steps, not negative after the softplus.
        A (`torch.Tensor` of shape `(channels, N)`): Diagonal of each channel's state matrix, negative.
        B (`torch.Tensor` of shape `(batch, 1, N)`): Input matrix.
        C (`torch.Tensor` of shape `(batch, 1, N)`): Readout.
        D (`torch.Tensor` of shape `(channels,)`, *optional*): Skip connection: \\( D u \\) is added to the output.
        z (`torch.Tensor` of shape `(batch, 1, channels)`, *optional*): Gate: its SiLU multiplies the output.
        delta_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to the time steps, before the softplus.
        delta_softplus (`bool`, *optional*, defaults to `False`): Whether the time steps are the softplus of `delta`.

    Returns:
        `torch.Tensor` of shape `(batch, 1, channels)`: y, in the dtype of the state.

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or there is more than one step.
        [`~errors.ConfigurationError`]: an argument is not on the CPU, not floating-point or needs a gradient; or the
            state has another dtype or gaps. Nothing is written then.
    """
    steps, inputs = ("batch", "length", "channels"), ("batch", "length", "N")
    optional = {"D": (D, ("channels",)), "z": (z, steps), "delta_bias": (delta_bias, ("channels",))}
    arguments = {"u": (u, steps), "delta": (delta, steps), "A": (A, ("channels", "N"))}
    arguments |= {"B": (B, inputs), "C": (C, inputs)}
    arguments |= {name: found for name, found in optional.items() if found[0] is not None}
    require_step("selective_step", state, ("batch", "channels", "N"), arguments)
    bias, D = (state.new_zeros(A.shape[0]) if tensor is None else tensor for tensor in (delta_bias, D))
    z = state.new_empty(0, 0, 0) if z is None else z
    y = state.new_empty(u.shape)
    arrays = as_arrays(state.dtype, state, u, delta, A, B, C, bias, D, z)
    sequences, blocks = divide_work(
        state.shape[0], -(-A.shape[0] // CHANNEL_BLOCK), shared=state.numel() >= WORTH_SHARING
    )
    run_units(step_forward, [(*arrays, delta_softplus, y.numpy(), s, k) for s in sequences for k in blocks])
    return y
