"""Balanced truncation of every system of a batch to one size, each as far as its own spectrum carries.

Error bound: that of [`~systems.reductors.balanced`] for every system, at the rank that it is really reduced to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...errors import TruncationError
from .._validation import validated_rank
from ..hankel import HankelDecomposition
from ..lti import DiagonalLTI
from ..truncation import Truncation
from .balanced import DEFAULT_CONDITION_LIMIT, balanced_truncation, balancing_truncation

# How far below the wanted rank to look where a truncation fails its checks.
_NEIGHBOURS = 3


@torch.no_grad()
def balanced_truncation_of_each(
    system: DiagonalLTI,
    r: int,
    decomposition: HankelDecomposition | None = None,
    condition_limit: float = DEFAULT_CONDITION_LIMIT,
) -> Truncation:
    """Reduce every system of a batch to `r` states, of which some may be inert.

    A system that has fewer than `r` Hankel singular values above rounding is reduced to those it has, which loses
    nothing; one whose truncation fails a check at `r` is reduced to the next lower rank that passes. What is missing to
    `r` states is filled with inert ones ([`Truncation`]), so that the result has one size and one such system does not
    keep the others from being cut.

    Args:
        system ([`DiagonalLTI`]): A stable system, or a batch of them.
        r (`int`): Number of states to keep, from 1 to N.
        decomposition ([`HankelDecomposition`], *optional*): The system's own, where it is known already.
        condition_limit (`float`, *optional*, defaults to 1e5): As in [`balanced_truncation`].

    Returns:
        [`Truncation`]: complex128; its `active` states come first in each system.

    Raises:
        DimensionError: `r` is not an integer from 1 to N.
        UnstableSystemError: A pole of a system is not stable.
        TruncationError: No system has a usable Hankel singular value, or one fails its checks at `r` and at the next
            lower ranks.
    """
    r = validated_rank(r, system.order)
    if r == system.order:
        return balanced_truncation(system, r, condition_limit)[1]
    batch = flattened_system(system)
    known = system.hankel_decomposition() if decomposition is None else decomposition
    usable = known.usable_rank
    if known.resolution and bool((usable < r).any()):
        known = system.hankel_decomposition()
        usable = known.usable_rank
    decompositions = flattened_decomposition(known, batch.lam.shape[0])
    return truncation_of_each(
        batch,
        decompositions,
        r,
        system.batch_shape,
        lambda part, known, rank: balanced_truncation(part, rank, condition_limit, known)[1],
    )


def truncation_of_each(
    batch: DiagonalLTI,
    decompositions: HankelDecomposition,
    r: int,
    shape: tuple[int, ...],
    truncate: Callable[[DiagonalLTI, HankelDecomposition, int], Truncation],
) -> Truncation:
    """Truncate every system of a batch as far as its own spectrum carries, and fill up with inert states.

    Args:
        batch ([`DiagonalLTI`]): Systems with one batch dimension.
        decompositions ([`HankelDecomposition`]): What each of them is truncated by.
        r (`int`): Number of states to keep, from 1 to N.
        shape (`tuple[int, ...]`): The leading dimensions of the result.
        truncate (`Callable`): Cuts systems, with their decompositions, to a rank.

    Raises:
        TruncationError: No system has a usable singular value, or one fails its checks at `r` and at the next lower
            ranks.
    """
    ranks = decompositions.usable_rank.clamp_max(r)
    if not ranks.any():
        raise TruncationError(
            "no Hankel singular value stands above rounding: a response of zero has no balanced state"
        )
    T = batch.lam.new_zeros(batch.lam.shape[0], batch.order, r)
    W, active = torch.zeros_like(T), torch.zeros(*T.shape[::2], dtype=torch.bool, device=T.device)
    for rank in ranks.unique().tolist():
        if rank:
            members = (ranks == rank).nonzero().squeeze(-1)
            for found, truncation in _reduced(batch, decompositions, members, rank, truncate):
                size = truncation.state_size
                T[found, :, :size], W[found, :, :size], active[found, :size] = truncation.T, truncation.W, True
    T, W, active = T.reshape(*shape, -1, r), W.reshape(*shape, -1, r), active.reshape(*shape, r)
    return Truncation(T=T, W=W, active=None if active.all() else active)


@torch.no_grad()
def balancing_truncation_of_each(decomposition: HankelDecomposition, r: int) -> Truncation:
    """[`balancing_truncation`] of every pair of Gramians of a batch, each as far as its own spectrum carries.

    A pair that has fewer than `r` Hankel singular values above rounding keeps those it has; inert states
    ([`Truncation`]) fill the rest, so that it does not keep the others from being cut.

    The coordinates of each pair are multiplied by one number, so that `T` and `W` are equally large (Frobenius norm):
    the scale of a measured observability Gramian is that of the loss, and must not become that of trained matrices.
    Both Gramians of the result are multiples of `diag(sigma_1, ..., sigma_r)`.

    Args:
        decomposition ([`HankelDecomposition`]): Of a batch of pairs of measured Gramians, or of one pair.
        r (`int`): Number of states to keep, from 1 to N.

    Returns:
        [`Truncation`]: float64 for real Gramians, complex128 otherwise; its `active` states come first in each pair.

    Raises:
        DimensionError: `r` is not an integer from 1 to N.
        TruncationError: No pair has a usable Hankel singular value.
    """
    r = validated_rank(r, decomposition.sigma.shape[-1])
    ranks = decomposition.usable_rank.clamp_max(r)
    if bool((ranks == r).all()):
        return _equally_large(balancing_truncation(decomposition, r))
    if not ranks.any():
        raise TruncationError(
            "no Hankel singular value stands above rounding: a response of zero has no balanced state"
        )
    shape = ranks.shape
    ranks = ranks.reshape(-1)
    pairs = flattened_decomposition(decomposition, len(ranks))
    T = pairs.L_P.new_zeros(*pairs.L_P.shape[:-1], r)
    W, active = torch.zeros_like(T), torch.zeros(len(ranks), r, dtype=torch.bool, device=T.device)
    for rank in ranks.unique().tolist():
        if rank:
            members = (ranks == rank).nonzero().squeeze(-1)
            truncation = balancing_truncation(_decomposition_of(pairs, members), rank)
            T[members, :, :rank], W[members, :, :rank], active[members, :rank] = truncation.T, truncation.W, True
    T, W = T.reshape(*shape, -1, r), W.reshape(*shape, -1, r)
    return _equally_large(Truncation(T=T, W=W, active=active.reshape(*shape, r)))


def _equally_large(truncation: Truncation) -> Truncation:
    """The same truncation of each pair in coordinates in which `T` and `W` have one Frobenius norm."""
    sizes = [torch.linalg.matrix_norm(M, keepdim=True) for M in (truncation.T, truncation.W)]
    scale = torch.where(sizes[1] > 0, sizes[0] / sizes[1], 1).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return replace(truncation, T=truncation.T / scale, W=truncation.W * scale)


def _reduced(
    system: DiagonalLTI,
    decomposition: HankelDecomposition,
    members: torch.Tensor,
    rank: int,
    truncate: Callable[[DiagonalLTI, HankelDecomposition, int], Truncation],
) -> list[tuple[torch.Tensor, Truncation]]:
    """Truncations of some members of a batch; those that fail are found by halving, and try the ranks below."""
    try:
        part, known = _members(system, members), _decomposition_of(decomposition, members)
        return [(members, truncate(part, known, rank))]
    except TruncationError:
        if members.numel() > 1:
            halves = members.tensor_split(2)
            return [pair for half in halves for pair in _reduced(system, decomposition, half, rank, truncate)]
        for lower in range(rank - 1, max(0, rank - 1 - _NEIGHBOURS), -1):
            try:
                return [(members, truncate(part, known, lower))]
            except TruncationError:
                continue
        raise


def flattened_system(system: DiagonalLTI) -> DiagonalLTI:
    """The same systems with one batch dimension."""
    D = None if system.D is None else system.D.reshape(-1, *system.D.shape[-2:])
    lam = system.lam.reshape(-1, system.order)
    B, C = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (system.B, system.C))
    return DiagonalLTI(lam, B, C, D, system.time_domain)


def _members(system: DiagonalLTI, members: torch.Tensor) -> DiagonalLTI:
    if members.numel() == system.lam.shape[0]:
        return system
    D = None if system.D is None else system.D[members]
    return DiagonalLTI(system.lam[members], system.B[members], system.C[members], D, system.time_domain)


def flattened_decomposition(known: HankelDecomposition, count: int) -> HankelDecomposition:
    """The same decompositions with one batch dimension of the given length."""
    parts = {name: getattr(known, name) for name in ("L_P", "L_Q", "U", "V")}
    matrices = {name: tensor.reshape(count, *tensor.shape[-2:]) for name, tensor in parts.items()}
    return HankelDecomposition(sigma=known.sigma.reshape(count, -1), resolution=known.resolution, **matrices)


def _decomposition_of(known: HankelDecomposition, members: torch.Tensor) -> HankelDecomposition:
    if members.numel() == known.sigma.shape[0]:
        return known
    parts = (getattr(known, name)[members] for name in ("L_P", "L_Q", "U", "sigma", "V"))
    return HankelDecomposition(*parts, known.resolution)
