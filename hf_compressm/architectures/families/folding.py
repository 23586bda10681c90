"""Folding a readout into the projection that makes it, for the families whose B and C are linear in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...systems.truncation import Truncation
from ..changes import ParameterChange
from ..moment_maps.axis import AxisMap
from ..parameters import successor
from ..state_layout import StateAxis, StateLayout, rows_of_identity


def variance_shares(truncation: Truncation, kept: Tensor) -> Tensor:
    """How the gradient of `A_log` moves along the states, `(..., r, N)` float64."""
    if truncation.shares is None:
        return rows_of_identity(kept, truncation.full_size)
    return truncation.shares.to(device=kept.device, dtype=torch.float64)


def sliced_dynamics(axis: StateAxis, A_log: nn.Parameter, truncation: Truncation, kept: Tensor) -> ParameterChange:
    """
    The columns of `A_log` that belong to the kept states; their gradients take over shares of the dropped ones'.

    Args:
        axis ([`StateAxis`]): The axis of `A_log`, whose entries are its states alone.
        A_log (`torch.nn.Parameter`): The parameter.
        truncation ([`~systems.Truncation`]): The cut.
        kept (`torch.Tensor` of shape `(r,)` or `(groups, r)`, int64): The kept states.
    """
    shares = variance_shares(truncation, kept).expand(*kept.shape, -1)
    return ParameterChange(A_log, successor(A_log, axis.take(A_log.detach(), kept)), AxisMap(axis.axis, shares, kept))


def folded(layout: StateLayout, module: nn.Module, truncation: Truncation, kept: Tensor) -> list[ParameterChange]:
    r"""
    The changes of a layer whose B and C are linear in one projection: \\( \tilde C_t = T^\top C_t \\) in its weights.

    The weights of a projection move with the kept rows for B and \\( T^\top \\) for C; their gradients the other way
    round.

    Args:
        layout ([`StateLayout`]): Where the state lies; the roles of its runs are `"A"`, `"B"` and `"C"`.
        module (`torch.nn.Module`): The layer's module.
        truncation ([`~systems.Truncation`]): The cut.
        kept (`torch.Tensor` of shape `(r,)` or `(groups, r)`, int64): The kept states.
    """
    N = truncation.full_size
    picked = rows_of_identity(kept, N)
    T = truncation.T.to(device=kept.device, dtype=torch.float64).expand(*kept.shape[:-1], N, -1)
    changes = []
    for axis, old in zip(layout.axes, layout.parameters(module).values()):
        if axis.parameter == "A_log":
            changes.append(sliced_dynamics(axis, old, truncation, kept))
            continue
        weights = axis.matrix({"B": picked, "C": T.mT})
        moments = AxisMap(axis.axis, axis.matrix({"B": T.mT, "C": picked}), axis.kept(kept, N))
        changes.append(ParameterChange(old, successor(old, weights @ old.detach().double()), moments))
    return changes
