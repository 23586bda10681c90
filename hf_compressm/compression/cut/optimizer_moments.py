r"""
How the moments that an optimizer keeps of a parameter move when the parameter is cut.

Under a cut the gradient moves as \\( g_r = M g \\) along one axis ([`~architectures.AxisMap`]); a first moment moves
the same way and a second moment with \\( M \circ M \\). A state that is not known by name is reset for the parameters
that were cut, with a warning, and left alone for all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...architectures import AxisMap, ParameterChange

logger = logging.getLogger(__name__)

# Averages of gradients: Adam and its relatives, SGD, RMSprop (centered), Lion.
FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
# Averages or sums of squared gradients: Adam and AMSGrad, RMSprop, Adagrad, Adafactor of torch and of transformers.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"})
# Adafactor's factors of a second moment: the mean over the last axis, and the mean over the last axis but one.
ROW_FACTORS = frozenset({"exp_avg_sq_row", "row_var"})
COLUMN_FACTORS = frozenset({"exp_avg_sq_col", "col_var"})
_FACTOR_PAIRS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))


def carry_state(state: dict[str, Any], change: ParameterChange, optimizer_name: str = "optimizer") -> dict[str, Any]:
    """
    The optimizer state of a cut parameter.

    Args:
        state (`dict`): State of the old parameter; tensors of its shape, factored tensors, and scalars.
        change ([`ParameterChange`]): The cut and its moment map.
        optimizer_name (`str`, *optional*, defaults to `"optimizer"`): Named in the warning.

    Returns:
        `dict`: State of the new parameter; empty, so that the optimizer starts it afresh, where the change has no
        map or something in it is not known by name.
    """
    if change.moment_map is None:
        logger.info(
            "the state of a parameter that was cut from %s to %s is reset: its gradient does not move linearly",
            tuple(change.old.shape),
            tuple(change.new.shape),
        )
        return {}
    carried: dict[str, Any] = {}
    update_averages = _update_averages(state)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1 != change.old.numel():
            carried[name] = value
            continue
        # Quantised states are subclasses of a tensor that know few operations.
        move = _mover(name, value, change, name in update_averages) if type(value) is Tensor else None
        if move is None:
            logger.warning(
                "%s keeps a state %r of shape %s for a parameter of shape %s that was cut to %s, and how it moves is "
                "not known; the state of this parameter is reset.",
                optimizer_name, name, tuple(value.shape), tuple(change.old.shape), tuple(change.new.shape),
            )  # fmt: skip
            return {}
        carried[name] = move(value)
    if change.moment_map.moves_factors and change.moment_map.axis == change.old.ndim - 2:
        _rescale_column_factors(state, carried, change.old.ndim)
    return carried


def _update_averages(state: dict[str, Any]) -> frozenset[str]:
    """Names in a state that average normalised updates; these keep their size, whatever the gradients do."""
    if "square_avg" in state:  # RMSprop
        return frozenset({"momentum_buffer"})
    return frozenset({"exp_avg"}) if "RMS" in state else frozenset()  # Adafactor of transformers


def _mover(
    name: str, value: Tensor, change: ParameterChange, is_update_average: bool
) -> Callable[[Tensor], Tensor] | None:
    """What maps a state tensor, by its name and its shape, or None where that is not known."""
    axis_map: AxisMap = change.moment_map
    shape, ndim = tuple(change.old.shape), change.old.ndim
    if tuple(value.shape) == shape:
        if is_update_average:
            return axis_map.sliced().first
        if name in FIRST_MOMENTS:
            return axis_map.first
        return axis_map.second if name in SECOND_MOMENTS else None
    if ndim < 2 or not axis_map.moves_factors:
        return None
    # A factor lacks one axis of the parameter (transformers) or has length 1 there (torch).
    missing = ndim - 1 if name in ROW_FACTORS else ndim - 2 if name in COLUMN_FACTORS else None
    if missing is None:
        return None
    squeezed = shape[:missing] + shape[missing + 1 :]
    kept = shape[:missing] + (1,) + shape[missing + 1 :]
    if tuple(value.shape) not in (squeezed, kept):
        return None
    if axis_map.axis == missing:
        return torch.clone
    moved = axis_map.axis - 1 if tuple(value.shape) == squeezed and axis_map.axis > missing else axis_map.axis
    return lambda moment: axis_map.second(moment, axis=moved)


def _rescale_column_factors(state: dict[str, Any], carried: dict[str, Any], ndim: int) -> None:
    """
    Keep Adafactor's estimate `row * column / mean(row)` of the kept entries when the rows, and so their mean, change.

    Source: Shazeer and Stern, 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithm 2.
    """
    for row, column in _FACTOR_PAIRS:
        if row in state and column in state and isinstance(state[row], Tensor):
            # A row factor of torch keeps the last axis with length 1, that of transformers drops it.
            axis = -2 if state[row].ndim == ndim else -1
            before = state[row].mean(axis, keepdim=True).clamp_min(torch.finfo(state[row].dtype).tiny)
            carried[column] = carried[column] * (carried[row].mean(axis, keepdim=True) / before)


def fits(name: str, value: Any, parameter: Tensor) -> bool:
    """
    Whether a state of a known name has the shape that its parameter needs; True for what is not known.

    Args:
        name (`str`): The state's name.
        value (`object`): The state.
        parameter (`torch.Tensor`): The parameter.
    """
    if not isinstance(value, Tensor) or value.numel() == 1:
        return True
    shape = tuple(parameter.shape)
    if name in FIRST_MOMENTS | SECOND_MOMENTS:
        return tuple(value.shape) == shape
    missing = -1 if name in ROW_FACTORS else -2 if name in COLUMN_FACTORS else None
    if missing is None or len(shape) < 2:
        return True
    factor = value.squeeze(missing) if value.ndim == len(shape) else value
    return tuple(factor.shape) == tuple(torch.empty(shape, device="meta").sum(missing).shape)
