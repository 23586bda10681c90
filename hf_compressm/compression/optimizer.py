r"""
The optimizer follows a cut: parameter groups hold the new parameters, and the moments move with the gradients.

Under a cut the gradient of a parameter moves as \\( g_r = M g \\) along one axis ([`~architectures.AxisMap`]); a first
moment moves the same way and a second moment with \\( M \circ M \\). A state that is not known by name is reset for the
parameters that were cut, with a warning, and left alone for all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..architectures import AxisMap, ParameterChange
from ..errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Averages of gradients (or of updates, which move alike): Adam and its kin, SGD, RMSprop, Lion, Adafactor.
_FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
# Averages or sums of squared gradients: Adam and AMSGrad, RMSprop, Adagrad, Adafactor of torch and of transformers.
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"})
# Adafactor's factors of a second moment: the mean over the last axis, and the mean over the last axis but one.
_ROW_FACTORS = frozenset({"exp_avg_sq_row", "row_var"})
_COLUMN_FACTORS = frozenset({"exp_avg_sq_col", "col_var"})


class OptimizerChange:
    """
    What a cut changes in an optimizer, computed before anything is written.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper such as `AcceleratedOptimizer` that holds the
            real one in its attribute `optimizer`.
        changes (`Sequence[ParameterChange]`): The parameters that are replaced.
        moments (`str`, *optional*, defaults to `"carry"`): `"carry"`, `"slice"` or `"reset"`, see [`CompreSSMConfig`].

    Raises:
        [`~errors.UnsupportedModelError`]: the optimizer keeps its parameters in a form of its own (DeepSpeed), so that
            their replacement would not be trained.
    """

    def __init__(self, optimizer: Any, changes: Sequence[ParameterChange], moments: str = "carry") -> None:
        self._optimizer = unwrap_optimizer(optimizer)
        self._changes = {id(change.old): change for change in changes}
        self._groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self._require_known(changes)
        self._old_states = {
            change.old: self._optimizer.state[change.old] for change in changes if change.old in self._optimizer.state
        }
        self._new_states = {
            change.new: self._state_after(change, self._old_states.get(change.old, {}), moments)
            for change in changes
            if change.old in self._old_states or change.optimizer_state
        }

    def _require_known(self, changes: Sequence[ParameterChange]) -> None:
        held = {id(parameter) for group in self._groups for parameter in group}
        strays = [change for change in changes if change.old.requires_grad and id(change.old) not in held]
        if strays and len(strays) == len([change for change in changes if change.old.requires_grad]):
            raise UnsupportedModelError(
                f"none of the {len(strays)} trained parameters that would be cut is in "
                f"{type(self._optimizer).__name__}; it may train flattened or partitioned copies (DeepSpeed, FSDP with "
                "original parameters off), which a cut cannot follow. Compress in a run without such a wrapper."
            )

    def _state_after(self, change: ParameterChange, state: dict[str, Any], moments: str) -> dict[str, Any]:
        if change.optimizer_state is not None:
            return dict(change.optimizer_state)
        if moments == "reset":
            return {}
        if moments == "slice" and change.moment_map is not None:
            change = replace(change, moment_map=change.moment_map.sliced())
        return carry_state(state, change, type(self._optimizer).__name__)

    def commit(self) -> None:
        """Let the parameter groups hold the new parameters, with their carried state."""
        for group, parameters in zip(self._optimizer.param_groups, self._groups):
            group["params"] = [
                self._changes[id(parameter)].new if id(parameter) in self._changes else parameter
                for parameter in parameters
            ]
        for old in self._old_states:
            self._optimizer.state.pop(old, None)
        self._optimizer.state.update(self._new_states)
        require_matching_states(self._optimizer)

    def rollback(self) -> None:
        """Put the old parameters and their state back."""
        for group, parameters in zip(self._optimizer.param_groups, self._groups):
            group["params"] = list(parameters)
        for new in self._new_states:
            self._optimizer.state.pop(new, None)
        self._optimizer.state.update(self._old_states)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer of nested wrappers that hold it in their attribute `optimizer`."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def carry_state(state: dict[str, Any], change: ParameterChange, optimizer_name: str = "optimizer") -> dict[str, Any]:
    """
    The optimizer state of a cut parameter.

    Args:
        state (`dict`): State of the old parameter; tensors of its shape, factored tensors, and scalars.
        change ([`ParameterChange`]): The cut and its moment map.
        optimizer_name (`str`, *optional*, defaults to `"optimizer"`): Named in the warning.

    Returns:
        `dict`: State of the new parameter; empty, so that the optimizer starts it afresh, where something in it is not
        known by name or the change has no moment map.
    """
    carried: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1 != change.old.numel():
            carried[name] = value
            continue
        move = None if change.moment_map is None else _mover(name, value, change)
        if move is None:
            logger.warning(
                "%s keeps a state %r of shape %s for a parameter of shape %s that was cut to %s, and how it moves is "
                "not known; the state of this parameter is reset.",
                optimizer_name, name, tuple(value.shape), tuple(change.old.shape), tuple(change.new.shape),
            )  # fmt: skip
            return {}
        carried[name] = move(value)
    return carried


def _mover(name: str, value: Tensor, change: ParameterChange) -> Callable[[Tensor], Tensor] | None:
    """What maps a state tensor, by its name and its shape, or None where that is not known."""
    axis_map: AxisMap = change.moment_map
    shape, ndim = tuple(change.old.shape), change.old.ndim
    if tuple(value.shape) == shape:
        if name in _FIRST_MOMENTS:
            return axis_map.first
        return axis_map.second if name in _SECOND_MOMENTS else None
    if ndim < 2:
        return None
    # A factor lacks one axis of the parameter (transformers) or has length 1 there (torch).
    missing = ndim - 1 if name in _ROW_FACTORS else ndim - 2 if name in _COLUMN_FACTORS else None
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


def drop_stale_states(optimizer: Any) -> int:
    """
    Forget the state of parameters whose size has changed behind the optimizer's back, as a loaded checkpoint does.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or a wrapper of it.

    Returns:
        `int`: Parameters whose state was dropped.
    """
    optimizer = unwrap_optimizer(optimizer)
    stale = [
        parameter
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor) and not all(_fits(name, state[name], parameter) for name in state)
    ]
    for parameter in stale:
        del optimizer.state[parameter]
    return len(stale)


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state of a known name has the shape that the parameter needs."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return True
    shape = tuple(parameter.shape)
    if name in _FIRST_MOMENTS | _SECOND_MOMENTS:
        return tuple(value.shape) == shape
    missing = -1 if name in _ROW_FACTORS else -2 if name in _COLUMN_FACTORS else None
    if missing is None or len(shape) < 2:
        return True
    factor = torch.empty(shape, device="meta").sum(missing)
    return tuple(value.squeeze(missing).shape if value.ndim == len(shape) else value.shape) == tuple(factor.shape)


def require_matching_states(optimizer: torch.optim.Optimizer) -> None:
    """
    Check that every moment fits its parameter.

    The fused optimizers of torch check no shapes themselves and read or write beyond a tensor's end.

    Raises:
        `AssertionError`: a known moment has another shape than its parameter, which is an error of this library.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                is_moment = name in _FIRST_MOMENTS | _SECOND_MOMENTS and isinstance(value, Tensor) and value.numel() > 1
                if is_moment and value.shape != parameter.shape:
                    raise AssertionError(
                        f"{name} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}"
                    )
