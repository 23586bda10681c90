"""A truncation applied to a diagonal system."""

from __future__ import annotations

import torch

from ..errors import DimensionError, TruncationError
from ._validation import clear_deviation
from .lti import DiagonalLTI
from .truncation import Truncation


def project(system: DiagonalLTI, truncation: Truncation, neglect_coupling: bool = False) -> DiagonalLTI:
    """The reduced system `(W^H A T, W^H B, C T, D)`, for a truncation that keeps the state matrix diagonal.

    Every reductor of this package returns such a truncation for a diagonal system: selections and interpolations keep
    some of the poles, and balanced truncation takes the poles of the reduced system as its basis.

    Args:
        system ([`DiagonalLTI`]): The full system.
        truncation ([`Truncation`]): With `full_size` equal to the system's order. Leading dimensions broadcast, so one
            truncation serves a whole batch of systems.
        neglect_coupling (`bool`, *optional*, defaults to `False`): Leave out what `W^H A T` has off its diagonal, for a
            system that is close to the one that the truncation was made for.

    Returns:
        [`DiagonalLTI`]: Of order `truncation.state_size`, in the same time domain.

    Raises:
        DimensionError: The truncation belongs to a state of another size, or its batch does not broadcast to the
            system's.
        TruncationError: `W^H A T` is not diagonal, so no `DiagonalLTI` is the reduced system.
    """
    if truncation.full_size != system.order:
        raise DimensionError(
            f"the truncation is for {truncation.full_size} states and the system has {system.order}; they must agree."
        )
    if truncation.T.device != system.lam.device:
        raise DimensionError(
            f"the truncation is on {truncation.T.device} and the system on {system.lam.device}; move them to one "
            f"device."
        )
    T, W = truncation.T.to(torch.complex128), truncation.W.to(torch.complex128)
    A = W.mH @ (system.lam.unsqueeze(-1) * T)
    lam = A.diagonal(dim1=-2, dim2=-1)
    coupling, size = (A - torch.diag_embed(lam)).abs().amax().item(), system.lam.abs().amax().item()
    allowed = clear_deviation(truncation.T) * max(size, 1.0)
    if coupling > allowed and not neglect_coupling:
        raise TruncationError(
            f"W^H A T couples its states: the largest off-diagonal entry is {coupling:.3g}, allowed is {allowed:.1g}. "
            f"Use a truncation that keeps poles (selection, interpolation), or balanced_truncation, which diagonalises."
        )
    if tuple(lam.shape[:-1]) != system.batch_shape:
        raise DimensionError(
            f"the truncation has leading dimensions {tuple(truncation.T.shape[:-2])} and the system "
            f"{system.batch_shape}; they must broadcast to the system's."
        )
    return DiagonalLTI(lam, W.mH @ system.B, system.C @ T, system.D, system.time_domain)
