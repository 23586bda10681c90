"""How a kernel sees the rows of a tensor that is a piece of a larger one, such as half of what a projection makes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

Rows = tuple[np.ndarray, int, int]
"""Flat memory, and how many numbers further the next sequence and the next step are."""


def rows(tensor: Tensor) -> Rows:
    """
    The memory of a tensor as one flat array: a kernel that reads neighbouring channels needs to know that they lie next
    to each other, and an array with strides of its own does not tell the compiler so.

    Args:
        tensor (`torch.Tensor` of shape `(batch, length, channels)`): On the CPU. Copied if its channels are not next to
            each other.

    Returns:
        `tuple[np.ndarray, int, int]`: The entry of sequence b, step t and channel c is `flat[b * by_sequence + t *
        by_step + c]`.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    by_sequence, by_step, _ = tensor.stride()
    batch, length, channels = tensor.shape
    span = (batch - 1) * by_sequence + (length - 1) * by_step + channels if tensor.numel() else 0
    return tensor.detach().as_strided((span,), (1,)).numpy(), by_sequence, by_step
