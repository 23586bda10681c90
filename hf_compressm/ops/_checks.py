"""Argument checks of the recurrences, with messages that name both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError, DimensionError


def check_shapes(allow_complex: bool = False, **arguments: tuple[Tensor, tuple[str, ...]]) -> dict[str, int]:
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
        expected = ", ".join(axis if axis not in sizes else f"{axis} {sizes[axis]}" for axis in axes)
        fits = tensor.ndim == len(axes)
        fits = fits and all(sizes.setdefault(axis, length) == length for axis, length in zip(axes, tensor.shape))
        if not fits:
            raise DimensionError(f"`{name}` has shape {tuple(tensor.shape)}; expected ({expected}).")
        if not (tensor.is_floating_point() or (allow_complex and tensor.is_complex())):
            raise ConfigurationError(f"`{name}` has dtype {tensor.dtype}; convert it to a floating-point dtype.")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ConfigurationError(f"`{name}` is on {tensor.device} and other arguments are on {device}.")
    return sizes


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an argument is float64; float32 for everything narrower."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
