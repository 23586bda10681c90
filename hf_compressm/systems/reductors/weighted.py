"""Balanced truncation with a controllability Gramian that was measured on the inputs a system really sees.

Error bound: none. The bound of balanced truncation is about white noise at the input; what a weighted truncation loses
on other inputs is measured on them.
"""

from __future__ import annotations

import torch

from ...errors import DimensionError
from .._validation import validated_rank
from ..gramians import cauchy_or_product_factor, gramian_factor
from ..hankel import HankelDecomposition
from ..lti import DiagonalLTI
from ..ranks import error_bound
from ..truncation import Truncation
from .balanced import DEFAULT_CONDITION_LIMIT, diagonal_balanced_form
from .balanced_each import (
    balanced_truncation_of_each,
    balancing_truncation_of_each,
    flattened_decomposition,
    flattened_system,
    truncation_of_each,
)
from .reductor import KnownGramians, Reductor, StateChoice, register_reductor


@torch.no_grad()
def weighted_hankel_decomposition(
    system: DiagonalLTI, P: torch.Tensor, Q: torch.Tensor | None = None
) -> HankelDecomposition:
    """The square-root decomposition of a measured pair of Gramians, or of a measured `P` and the closed form of `Q`.

    Its singular values depend on the scale of what was measured; their ratios say which share of the output's energy
    on the data each direction carries.

    Args:
        system ([`DiagonalLTI`]): A stable system, or a batch of them.
        P (`torch.Tensor` of shape `(..., N, N)`): Sum or mean of `h h^H` over the states that its inputs cause.
        Q (`torch.Tensor` of shape `(..., N, N)`, *optional*): Sum or mean of `g g^H` over the adjoint states of a loss;
            when unset, `Q = A^H Q A + C^H C` in closed form.

    Raises:
        DimensionError: A Gramian is not of the system's order and batch.
        NotFiniteError: An entry is NaN or infinite.
        ConfigurationError: A Gramian is not Hermitian, or clearly indefinite.
        UnstableSystemError: A pole of the system is not stable.

    Example:

    ```python
    >>> import torch
    >>> system = DiagonalLTI(torch.tensor([0.9, 0.5]), B=torch.ones(2, 1), C=torch.ones(1, 2))
    >>> own = weighted_hankel_decomposition(system, system.controllability_gramian())
    >>> bool(torch.allclose(own.sigma, system.hankel_singular_values()))  # white noise is what the closed form assumes
    True

    ```
    """
    system.require_stable()
    expected = (*system.batch_shape, system.order, system.order)
    for name, gramian in {"P": P, "Q": Q}.items():
        if gramian is not None and tuple(gramian.shape) != expected:
            raise DimensionError(f"{name} has shape {tuple(gramian.shape)}; for this system it must be {expected}.")
    if Q is None:
        L_Q = cauchy_or_product_factor(system.lam.conj(), system.C.mH, coarse=True, time_domain=system.time_domain)
    else:
        L_Q = gramian_factor(Q, "Q")
    return HankelDecomposition.from_factors(gramian_factor(P, "P").to(L_Q.device), L_Q)


@torch.no_grad()
def weighted_truncation(
    system: DiagonalLTI,
    r: int,
    P: torch.Tensor,
    Q: torch.Tensor | None = None,
    condition_limit: float = DEFAULT_CONDITION_LIMIT,
    decomposition: HankelDecomposition | None = None,
) -> Truncation:
    """Reduce every system of a batch to `r` states in coordinates that balance a measured pair of Gramians.

    With `Q` in closed form the reduced system is stable for any `P`: where `Q` is balanced to `diag(S1, S2)`, the
    leading block of `A^H Q A - Q = -C^H C` reads `A11^H S1 A11 - S1 <= 0` (Enns, 1984). With a measured `Q` stability
    is not implied; it is checked. A system with fewer than `r` usable directions is reduced to those it has and filled
    up with inert states, and one that fails its checks at `r` takes the next lower rank that passes.

    Source: Enns, 1984, "Model reduction with balanced realizations: an error bound and a frequency weighted
    generalization"; with a measured `Q`, Rowley, 2005, "Model reduction for fluids, using balanced proper orthogonal
    decomposition".

    Args:
        system ([`DiagonalLTI`]): A stable system, or a batch of them.
        r (`int`): Number of states to keep, from 1 to N.
        P (`torch.Tensor` of shape `(..., N, N)`): As in [`weighted_hankel_decomposition`].
        Q (`torch.Tensor` of shape `(..., N, N)`, *optional*): As in [`weighted_hankel_decomposition`].
        condition_limit (`float`, *optional*, defaults to 1e5): As in [`balanced_truncation`].
        decomposition ([`HankelDecomposition`], *optional*): That of the two Gramians, where it is known already.

    Returns:
        [`Truncation`]: complex128, in the basis of the reduced state matrices' eigenvectors.

    Raises:
        DimensionError, NotFiniteError, ConfigurationError, UnstableSystemError: As in
            [`weighted_hankel_decomposition`], or `r` is not an integer from 1 to N.
        TruncationError: No system has a usable direction, or one fails its checks at `r` and at the next lower ranks.

    Example:

    ```python
    >>> import torch
    >>> system = DiagonalLTI(torch.tensor([0.9, 0.8, -0.5]), B=torch.ones(3, 1), C=torch.ones(1, 3))
    >>> slow = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.1], [0.1, 0.1, 0.02]])  # states under a slow input
    >>> weighted_truncation(system, 1, slow).state_size
    1

    ```
    """
    r = validated_rank(r, system.order)
    if decomposition is None:
        decomposition = weighted_hankel_decomposition(system, P, Q)
    batch = flattened_system(system)
    return truncation_of_each(
        batch,
        flattened_decomposition(decomposition, batch.lam.shape[0]),
        r,
        system.batch_shape,
        lambda part, known, rank: diagonal_balanced_form(part, known, rank, condition_limit)[1],
    )


def _balanced(gramians: KnownGramians, rank: int, choice: StateChoice) -> Truncation:
    system, decomposition = gramians.system, gramians.decomposition
    if system is None:
        return balancing_truncation_of_each(decomposition, rank)
    if gramians.is_weighted:
        return weighted_truncation(system, rank, gramians.P, gramians.Q, decomposition=decomposition)
    return balanced_truncation_of_each(system, rank, decomposition)


BALANCED = register_reductor(
    Reductor(
        "balanced", _balanced, error_bound=error_bound, keeps_states=False, only_selects=False, reduces_systems=True
    )
)
