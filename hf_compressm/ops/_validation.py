"""Argument checks of the recurrences, with messages that name both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError, DimensionError


def require_shapes(allow_complex: bool = False, **arguments: tuple[Tensor, tuple[str, ...]]) -> dict[str, int]:
    """
    Check tensors against named axes, as in `u=(u, ("batch", "length", "channels"))`, and against one another.

    Args:
        allow_complex (`bool`, *optional*, defaults to `False`): Whether tensors may be complex.
        arguments (`tuple[torch.Tensor, tuple[str, ...]]`): For each argument, the tensor and the names of its axes. The
            first tensor that has an axis decides how long the axis is.

    Returns:
        `dict[str, int]`: The length of every axis.

    Raises:
        [`~errors.DimensionError`]: a tensor has another number of axes, or an axis another length.
        [`~errors.ConfigurationError`]: tensors are on different devices, or not floating-point.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, (tensor, axes) in arguments.items():
        known = dict(sizes)
        fits = tensor.ndim == len(axes)
        fits = fits and all(sizes.setdefault(axis, length) == length for axis, length in zip(axes, tensor.shape))
        if not fits:
            expected = ", ".join(axis if axis not in known else f"{axis} {known[axis]}" for axis in axes)
            raise DimensionError(f"`{name}` has shape {tuple(tensor.shape)}; expected ({expected}).")
        if not (tensor.is_floating_point() or (allow_complex and tensor.is_complex())):
            raise ConfigurationError(f"`{name}` has dtype {tensor.dtype}; convert it to a floating-point dtype.")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ConfigurationError(f"`{name}` is on {tensor.device} and other arguments are on {device}.")
    return sizes


def require_cpu(function: str, argument: Tensor, package: str) -> None:
    """
    Check that a function of the CPU gets tensors that are there.

    Args:
        function (`str`): Its name; the name of its reference is the same with `_reference` behind it.
        argument (`torch.Tensor`): One of its arguments.
        package (`str`): Whose kernels do the same on other devices.

    Raises:
        [`~errors.ConfigurationError`]: the argument is on another device.
    """
    if argument.device.type != "cpu":
        raise ConfigurationError(
            f"`{function}` runs on the CPU and its arguments are on {argument.device}. Use {package}'s kernels there, "
            f"or `{function}_reference`."
        )


def require_step(
    function: str, state: Tensor, axes: tuple[str, ...], arguments: dict[str, tuple[Tensor, tuple[str, ...]]]
) -> None:
    """
    Check the arguments of a single step that writes to its state, before it does, and let autograd know of the writing.

    Args:
        function (`str`): Its name.
        state (`torch.Tensor`): What is written.
        axes (`tuple[str, ...]`): The names of its axes.
        arguments (`dict[str, tuple[torch.Tensor, tuple[str, ...]]]`): The other tensors, as for [`require_shapes`].

    Raises:
        [`~errors.DimensionError`]: a shape does not fit the others, or there is more than one step.
        [`~errors.ConfigurationError`]: a tensor is not on the CPU, is not floating-point or needs a gradient; or the
            state is neither float32 nor float64, or has gaps.
    """
    length = require_shapes(state=(state, axes), **arguments)["length"]
    if length != 1:
        raise DimensionError(f"`{function}` makes one step and the arguments hold {length}; call it once for each.")
    if state.device.type != "cpu":
        raise ConfigurationError(f"`{function}` runs on the CPU and its arguments are on {state.device}.")
    if state.dtype not in (torch.float32, torch.float64) or not state.is_contiguous():
        raise ConfigurationError(
            f"`state` has dtype {state.dtype} and strides {state.stride()}; `{function}` writes to a contiguous one of "
            "float32 or float64."
        )
    if torch.is_grad_enabled():
        given = {"state": state, **{name: tensor for name, (tensor, _) in arguments.items()}}
        for name in (name for name, tensor in given.items() if tensor.requires_grad):
            raise ConfigurationError(f"`{name}` needs a gradient, and `{function}` has none; use `torch.no_grad()`.")
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


def validated_times(times: Tensor | None, batch: int, length: int) -> Tensor:
    """
    Check the sampled steps of each sequence; every step of every sequence where none are given.

    Args:
        times (`torch.Tensor` of shape `(batch, K)`, int64, *optional*): Ascending steps.
        batch (`int`): Number of sequences.
        length (`int`): Number of time steps.

    Raises:
        [`~errors.DimensionError`]: shape or dtype are others, or a row does not ascend inside the sequence.
    """
    if times is None:
        return torch.arange(length).expand(batch, length)
    if times.ndim != 2 or times.shape[0] != batch or times.dtype != torch.int64:
        raise DimensionError(
            f"`times` has shape {tuple(times.shape)} and dtype {times.dtype}; expected (batch {batch}, K) and int64."
        )
    if times.numel() and not (times.min() >= 0 and times.max() < length and (times.diff(dim=1) >= 0).all()):
        raise DimensionError(f"`times` must hold ascending steps from 0 to {length - 1} in each row.")
    return times


def double_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without double precision (Apple's GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


def elements_at_once(elements: int, device: torch.device) -> int:
    """
    How many numbers to hold at once, where so many are good for a CPU's cache.

    A GPU has four times as many, as it waits between pieces that it is done with sooner than the next is asked for.
    """
    return elements if device.type == "cpu" else 4 * elements


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an argument is float64; float32 for everything narrower."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
