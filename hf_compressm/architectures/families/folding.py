"""Folding a readout into the projection that makes it, for the families whose B and C are linear in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...systems.truncation import Truncation
from .selective import rows_of_identity


def variance_shares(truncation: Truncation, kept: Tensor) -> Tensor:
    """How the gradient of `A_log` moves along the states, `(..., r, N)` float64."""
    if truncation.shares is None:
        return rows_of_identity(kept, truncation.full_size)
    return truncation.shares.to(device=kept.device, dtype=torch.float64)


def projection_rows(rank: int, kept: Tensor, size: int) -> Tensor:
    """
    The rows of `x_proj` that belong to the time step and to the kept states, `(..., rank + 2 r)` int64.

    Args:
        rank (`int`): Rows of the time step.
        kept (`torch.Tensor` of shape `(..., r)`, int64): The kept states.
        size (`int`): The present state size N.
    """
    time_step = torch.arange(rank, device=kept.device).expand(*kept.shape[:-1], rank)
    return torch.cat([time_step, rank + kept, rank + size + kept], dim=-1)


def projection_maps(rank: int, kept: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    How the rows of `x_proj` move: the weights with diag(I, E_S, T^T), their gradients with diag(I, T^T, E_S).

    Args:
        rank (`int`): Rows of the time step.
        kept (`torch.Tensor` of shape `(r,)`, int64): The kept states.
        T (`torch.Tensor` of shape `(N, r)`, float64): The reconstruction of the full state.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Two `(rank + 2 r, rank + 2 N)` float64 matrices.
    """
    time_step = torch.eye(rank, dtype=torch.float64, device=T.device)
    picked = rows_of_identity(kept, T.shape[0])
    return torch.block_diag(time_step, picked, T.mT), torch.block_diag(time_step, T.mT, picked)
