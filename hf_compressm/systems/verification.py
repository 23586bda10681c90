"""Does a reduced system keep what its reductor promised? Measured on frequency responses, whoever reduced it.

The same check serves a reductor before it returns and a caller that has written a reduced system into float32 weights
and reads it back.
"""

from __future__ import annotations

import torch

from ..errors import DimensionError, TruncationError
from ._decompositions import svdvals
from .lti import DiagonalLTI

_UNIFORM_FREQUENCIES = 64
# Complex numbers that one chunk of frequencies may hold: 64 MiB, so that wide layers do not exhaust the memory.
_CHUNK_ENTRIES = 2**22


def verification_frequencies(*systems: DiagonalLTI) -> torch.Tensor:
    """Frequencies at which two systems can differ most: the resonance of every pole, and a grid between them.

    The grid is uniform on the whole circle in discrete time, since complex systems have no symmetry, and logarithmic
    over the range of `|lam|`, on both sides of zero, in continuous time.

    Args:
        systems ([`DiagonalLTI`]): One or more systems with the same time domain and batch.

    Returns:
        `torch.Tensor` of shape `(..., W)`, float64: one set of frequencies for each system of the batch.
    """
    lam = torch.cat([system.lam for system in systems], dim=-1)
    if systems[0].time_domain == "discrete":
        grid = torch.linspace(-torch.pi, torch.pi, _UNIFORM_FREQUENCIES + 1, dtype=torch.float64, device=lam.device)[1:]
        return torch.cat([lam.angle(), grid.expand(*lam.shape[:-1], -1)], dim=-1)
    slow, fast = lam.abs().amin(dim=-1, keepdim=True).log(), lam.abs().amax(dim=-1, keepdim=True).log()
    steps = torch.linspace(0, 1, _UNIFORM_FREQUENCIES // 2, dtype=torch.float64, device=lam.device)
    grid = torch.exp(slow + (fast - slow) * steps)
    return torch.cat([lam.imag, torch.zeros_like(slow), grid, -grid], dim=-1)


def response_error(system: DiagonalLTI, reduced: DiagonalLTI, omega: torch.Tensor) -> torch.Tensor:
    """Largest singular value of `G(omega) - G_r(omega)` at every frequency.

    Args:
        system ([`DiagonalLTI`]): The full system.
        reduced ([`DiagonalLTI`]): The reduced system, with the same inputs, outputs, batch and time domain.
        omega (`torch.Tensor` of shape `(W,)` or `(..., W)`): Frequencies, as in [`DiagonalLTI.frequency_response`].

    Returns:
        `torch.Tensor` of shape `(..., W)`, float64.

    Raises:
        DimensionError: The systems do not have the same inputs, outputs, batch and time domain.
    """
    _require_comparable(system, reduced)
    parts = omega.split(_chunk_size(system), dim=-1)
    norms = [svdvals(_difference(system, reduced, part))[..., 0] for part in parts]
    return torch.cat(norms, dim=-1)


def require_error_bound(
    system: DiagonalLTI, reduced: DiagonalLTI, bound: float | torch.Tensor, amplification: float = 1.0
) -> None:
    """Raise `TruncationError` where a reduced system is further from the full one than a bound allows.

    Args:
        system ([`DiagonalLTI`]): The full system.
        reduced ([`DiagonalLTI`]): The reduced system, with the same inputs, outputs, batch and time domain.
        bound (`float` or `torch.Tensor` of shape `(...)`): Bound on the largest singular value of the difference, for
            each system of the batch; [`error_bound`] for a balanced truncation.
        amplification (`float`, *optional*, defaults to 1.0): Factor on the allowance for rounding, which is `N eps`
            times the size of the terms that a response is summed from and their sensitivity to their poles. A balanced
            truncation passes the condition number of its change of basis.

    Raises:
        DimensionError: The systems do not have the same inputs, outputs, batch and time domain.
        TruncationError: The bound is broken; the message gives frequency, error and bound.
    """
    error, allowed, omega = _errors(system, reduced, bound, amplification)
    excess = error - allowed
    if not (excess <= 0).all():
        worst = torch.unravel_index(excess.nan_to_num(torch.inf).argmax(), excess.shape)
        batch_index = [int(i) for i in worst[:-1]]
        where = f" of system {batch_index}" if batch_index else ""
        raise TruncationError(
            f"the reduced system breaks its error bound: |G - G_r| = {error[worst]:.6g} at frequency {omega[worst]:.6g}"
            f"{where}, allowed is {allowed[worst]:.6g} (the bound and rounding). Leave this layer as it is, or choose "
            f"another rank."
        )


def _errors(
    system: DiagonalLTI, reduced: DiagonalLTI, bound: float | torch.Tensor, amplification: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors (or upper bounds on them that are allowed), what is allowed, and the frequencies: all (..., W)."""
    _require_comparable(system, reduced)
    omega = verification_frequencies(system, reduced)
    rounding = _sensitivity(system, omega) + _sensitivity(reduced, omega)
    bound, amplification = (
        torch.as_tensor(value, dtype=torch.float64, device=omega.device).unsqueeze(-1)
        for value in (bound, amplification)
    )
    allowed = bound + torch.finfo(torch.float64).eps * amplification * rounding
    error = _frobenius_upper_bound(system, reduced, omega)
    doubtful = ~(error <= allowed)
    if doubtful.any():
        # Frequencies at which some system of the batch is in doubt, one chunk of them at a time.
        columns = doubtful.reshape(-1, doubtful.shape[-1]).any(0).nonzero().squeeze(-1)
        for chosen in columns.split(_chunk_size(system)):
            norm = _norm_unless_small(_difference(system, reduced, omega[..., chosen]), allowed[..., chosen])
            error[..., chosen] = torch.where(doubtful[..., chosen], norm, error[..., chosen])
    return error, allowed, omega


def _frobenius_upper_bound(system: DiagonalLTI, reduced: DiagonalLTI, omega: torch.Tensor) -> torch.Tensor:
    """An upper bound on the Frobenius norm of `G - G_r` at every frequency, (..., W), without forming any response.

    With the modes `m` of both systems side by side, `|G - G_r|_F^2 = m^H K m` where `K = (C^H C) o (B B^H)^T`: the cost
    of a frequency does not grow with inputs and outputs. The sum cancels, so its rounding error is added.
    """
    if not _same_feedthrough(system, reduced):
        return torch.full_like(omega, torch.inf)
    B = torch.cat([system.B, reduced.B], dim=-2)
    C = torch.cat([system.C, -reduced.C], dim=-1)
    K = (C.mH @ C) * (B @ B.mH).mT
    squares, sizes = [], []
    for part in omega.split(max(1, _CHUNK_ENTRIES // K[..., 0].numel()), dim=-1):
        modes = torch.cat([system.modal_response(part), reduced.modal_response(part)], dim=-1)
        squares.append(((modes.conj() @ K) * modes).sum(-1).real)
        sizes.append(((modes.abs() @ K.abs()) * modes.abs()).sum(-1))
    square, size = torch.cat(squares, dim=-1), torch.cat(sizes, dim=-1)
    inner = max(system.B.shape[-1], system.C.shape[-2])
    rounding = 4 * (K.shape[-1] + inner) * torch.finfo(torch.float64).eps
    return (square.clamp_min(0) + rounding * size).sqrt()


def _same_feedthrough(system: DiagonalLTI, reduced: DiagonalLTI) -> bool:
    if system.D is None or reduced.D is None:
        return system.D is reduced.D
    return torch.equal(system.D, reduced.D)


def _chunk_size(system: DiagonalLTI) -> int:
    """How many frequencies to evaluate at a time."""
    outputs, inputs = system.C.shape[-2], system.B.shape[-1]
    return max(1, _CHUNK_ENTRIES // (system.lam[..., 0].numel() * outputs * max(system.order, inputs)))


def _difference(system: DiagonalLTI, reduced: DiagonalLTI, omega: torch.Tensor) -> torch.Tensor:
    return system.frequency_response(omega) - reduced.frequency_response(omega)


def _norm_unless_small(difference: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Largest singular values, except where the Frobenius norm, which is no smaller, is already allowed.

    That spares nearly all singular value decompositions, which take most of the time for a layer with many channels.
    """
    norm = torch.linalg.matrix_norm(difference)
    doubtful = ~(norm <= allowed)
    if doubtful.any():
        norm[doubtful] = svdvals(difference[doubtful])[..., 0]
    return norm


def _require_comparable(system: DiagonalLTI, reduced: DiagonalLTI) -> None:
    def interface(s: DiagonalLTI) -> tuple:
        return s.time_domain, s.batch_shape, s.C.shape[-2], s.B.shape[-1], str(s.lam.device)

    if interface(system) != interface(reduced):
        raise DimensionError(
            f"the systems cannot be compared: (time domain, batch, outputs, inputs, device) are {interface(system)} "
            f"and {interface(reduced)}; all must agree."
        )


def _sensitivity(system: DiagonalLTI, omega: torch.Tensor) -> torch.Tensor:
    """`N (|D| + sum_i |c_i| |b_i| |phi_i| (1 + s |phi_i|))`: how relative changes of all numbers change a response.

    `phi_i` is the response of mode i, and `s` the size of the numbers in its denominator, where a pole counts with the
    size of the largest one: eigenvalues are computed to rounding of that.
    """
    weight = torch.linalg.vector_norm(system.C, dim=-2) * torch.linalg.vector_norm(system.B, dim=-1)
    modes = system.modal_response(omega).abs()
    largest_pole = system.lam.abs().amax(dim=-1, keepdim=True)
    size = 1.0 if system.time_domain == "discrete" else (omega.abs() + largest_pole).unsqueeze(-1)
    terms = (weight.unsqueeze(-2) * modes * (1 + size * modes)).sum(-1)
    if system.D is not None:
        terms = terms + torch.linalg.matrix_norm(system.D).unsqueeze(-1)
    return system.order * terms
