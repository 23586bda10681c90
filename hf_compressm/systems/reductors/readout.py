r"""Fit the readout of a truncation to the outputs: what reads the kept states need only give the same output.

A selective layer's output is `y = C_t^T h_t`. The regression `h ~ T h_r` rebuilds every dropped state as well as it
can, whatever reads it; the output needs `C_t^T T h_r` to be right, and `C_t` and `h_t` are not independent. That is
linear in `T`: a least-squares problem with one feature for each entry of `C_t` and of `h_r`.

Error bound: none known a priori. A fit is judged on sampled steps that it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from ...errors import DimensionError
from .._decompositions import qr
from ..output_samples import OutputSamples
from ..truncation import Truncation
from ._output_least_squares import OutputLeastSquares, best_iteration

# Shrinks the fourth moments of the sampled steps towards those of a readout that is independent of the state.
_RIDGE = 1e-2
# Entries of the matrices of systems that are solved together on a GPU: 256 MB.
_NUMBERS = 2**25
# How many systems are solved together on a CPU, where what is one system's stays in the cache.
_ON_A_CPU = 1


@torch.no_grad()
def fit_readout(truncation: Truncation, samples: OutputSamples, ridge: float = _RIDGE) -> Truncation:
    r"""Fit the `T` of a truncation to the outputs of sampled steps; states and dynamics stay those of `W`.

    Of all `T` with `W^H T = I`, the weighted mean of `(C_t^T h_td - C_t^T T W^H h_td)^2` is to be least. The normal
    equations, `sum_t C_t C_t^T T W^H P_t W = sum_t C_t C_t^T P_t W` with `P_t = sum_d w_td h_td h_td^T`, are solved for
    what is added to the given `T`, by conjugate gradients from there on. Were readout and states independent, the
    operator would be the Kronecker product of `E[C C^T]` and `W^H E[h h^T] W`; that product is its preconditioner and,
    times `ridge`, is added to it, which draws the solution to the given `T`.

    How far to follow the samples is for the held-out steps to say: the number of iterations is the one with the least
    error on them (conjugate gradients stopped early regularise as a ridge does). With it, all samples are used. Where
    no iteration is better than the given `T`, the truncation is returned as it is. Without held-out steps the iteration
    goes on until it converges.

    Source: linear least squares by conjugate gradients, Hestenes and Stiefel (1952); early stopping as regularisation,
    Hanke (1995), *Conjugate Gradient Type Methods for Ill-Posed Problems*. That the reduced readout is fitted to
    outputs is known from nonlinear model reduction by operator inference, Peherstorfer and Willcox (2016).

    Args:
        truncation ([`Truncation`]): A real one, for systems as many as the samples are of.
        samples ([`OutputSamples`]): On any device, of any real dtype; computed in float64.
        ridge (`float`, *optional*, defaults to 0.01): At least 0.

    Returns:
        [`Truncation`]: The same with another `T`, on its device. All but `T` are unchanged.

    Raises:
        DimensionError: The samples are not of the truncation's states.

    Example:

    ```python
    >>> import torch
    >>> h = torch.randn(50, 4, 1, generator=torch.Generator().manual_seed(0))
    >>> states = torch.cat([h, 2 * h, 3 * h], dim=-1)  # one state, three times
    >>> everything = OutputSamples(torch.ones(50, 3), states, torch.ones(50, 4), torch.zeros(50, dtype=torch.bool))
    >>> fitted = fit_readout(Truncation.from_indices([0], full_size=3), everything, ridge=0.0)
    >>> bool((fitted.T.sum() - 6).abs() < 1e-6)  # y = 6 h
    True

    ```
    """
    return fit_readouts([truncation], [samples], ridge)[0]


@torch.no_grad()
def fit_readouts(
    truncations: Sequence[Truncation], samples: Sequence[OutputSamples], ridge: float = _RIDGE
) -> list[Truncation]:
    """
    [`fit_readout`] for several truncations at once: a GPU solves systems of one size together in the time of one.

    Args:
        truncations (`Sequence[Truncation]`): Each as in [`fit_readout`].
        samples (`Sequence[OutputSamples]`): Those of each truncation, on any devices.
        ridge (`float`, *optional*, defaults to 0.01): At least 0.

    Returns:
        `list[Truncation]`: The same with another `T`, in their order.

    Raises:
        DimensionError: Samples are not of their truncation's states.
    """
    for truncation, seen in zip(truncations, samples, strict=True):
        _require_same_systems(truncation, seen)
    systems = [
        _System.of(T, W, part)
        for truncation, seen in zip(truncations, samples)
        if truncation.state_size < truncation.full_size
        for T, W, part in zip(*_each(truncation), [seen] if seen.readout.ndim == 2 else seen.each())
    ]
    solved = dict(chain.from_iterable(_solutions(alike, ridge) for alike in _alike(systems)))
    fitted = iter([system.T + (system.basis @ solved[place]).to(system.T) for place, system in enumerate(systems)])
    return [_with_fitted(truncation, fitted) for truncation in truncations]


def _with_fitted(truncation: Truncation, fitted: Iterator[torch.Tensor]) -> Truncation:
    if truncation.state_size == truncation.full_size:
        return truncation
    T = torch.stack([next(fitted) for _ in _each(truncation)[0]])
    return replace(truncation, T=T.reshape(truncation.T.shape))


def _require_same_systems(truncation: Truncation, samples: OutputSamples) -> None:
    if samples.readout.shape[-1] != truncation.full_size or samples.readout.ndim != truncation.T.ndim:
        raise DimensionError(
            f"the samples have readouts of shape {tuple(samples.readout.shape)}, and T has {tuple(truncation.T.shape)};"
            " they must be of the same systems, with N entries."
        )


def _each(truncation: Truncation) -> tuple[torch.Tensor, torch.Tensor]:
    """T and W of every system."""
    size = truncation.T.shape[-2:]
    return truncation.T.reshape(-1, *size), truncation.W.reshape(-1, *size)


@dataclass(frozen=True)
class _System:
    """One system's `T`, a basis of what may be added to it, what is to be explained, and the steps that judge a fit."""

    T: torch.Tensor
    basis: torch.Tensor
    problem: OutputLeastSquares
    held_out: torch.Tensor

    @classmethod
    def of(cls, T: torch.Tensor, W: torch.Tensor, samples: OutputSamples) -> _System:
        double = {"dtype": torch.float64, "device": samples.states.device}
        basis = _free_directions(W.to(**double), samples.states)
        return cls(T, basis, OutputLeastSquares.of(T.to(**double), W.to(**double), basis, samples), samples.held_out)


def _alike(systems: Sequence[_System]) -> list[list[tuple[int, _System]]]:
    """The systems with their places, in groups that are solved together."""
    groups: dict[Any, list[tuple[int, _System]]] = {}
    for place, system in enumerate(systems):
        problem = system.problem
        key = (problem.states.device, problem.free.shape, problem.states.shape, bool(system.held_out.any()))
        groups.setdefault(key, []).append((place, system))
    found = []
    for (device, *_), group in groups.items():
        most = _ON_A_CPU if device.type == "cpu" else max(1, _NUMBERS // group[0][1].problem.states.numel())
        found += [group[first : first + most] for first in range(0, len(group), most)]
    return found


def _solutions(group: Sequence[tuple[int, _System]], ridge: float) -> Iterator[tuple[int, torch.Tensor]]:
    """What is added to the `T` of each system of a group, in its basis, with the system's place."""
    problem = OutputLeastSquares.together([system.problem for _, system in group])
    held_out = torch.stack([system.held_out for _, system in group])
    last = None
    if held_out.any():
        seen, unseen = problem.split(held_out)
        last = best_iteration(unseen.error(found) for found in seen.iterates(ridge))
    # All samples together can converge in fewer steps than a part of them.
    for iteration, solution in enumerate(problem.iterates(ridge)):
        if last is None or iteration == 0:
            found = solution
        else:
            found = torch.where((iteration <= last)[:, None, None], solution, found)
        if last is not None and iteration >= int(last.max()):
            break
    return zip((place for place, _ in group), found)


def _free_directions(W: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A basis of what may be added to a column of `T`, `(N, N - r)`: all `d` with `W^H d = 0`, in the states' units."""
    deviation = torch.linalg.vector_norm(states, dim=(0, 1), dtype=torch.float64) / states[..., 0].numel() ** 0.5
    deviation = torch.where(deviation > 0, deviation, 1).unsqueeze(-1)
    N, r = W.shape
    dropped = (W == 0).all(1)
    if int(dropped.sum()) == N - r:
        # The rows of the kept states stay those of the identity, to the last bit.
        return torch.diag(deviation.squeeze(-1))[:, dropped]
    return deviation * qr(deviation * W, mode="complete")[0][:, r:]
