r"""Fit the readout of a truncation to the outputs: what reads the kept states need only give the same output.

A selective layer's output is `y = C_t^T h_t`. The regression `h ~ T h_r` rebuilds every dropped state as well as it
can, whatever reads it; the output needs `C_t^T T h_r` to be right, and `C_t` and `h_t` are not independent. That is
linear in `T`: a least-squares problem with one feature for each entry of `C_t` and of `h_r`.

Error bound: none known a priori. A fit is judged on sampled steps that it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch

from ...errors import DimensionError
from .._decompositions import qr, solve
from .._validation import require_finite
from ..truncation import Truncation

# Shrinks the fourth moments of the sampled steps towards those of a readout that is independent of the state.
_RIDGE = 1e-2
_ITERATIONS = 100
_CHUNK = 64
# Iterations without a smaller error on the held-out steps after which no more is expected.
_PATIENCE = 8
# Of the first step of the iteration, in the squared norm that it reduces.
_CONVERGED = 1e-8
# What keeps the preconditioner invertible where states are dependent.
_FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class OutputSamples:
    r"""
    Sampled steps of a layer with the output \\( y_{td} = C_t^\top h_{td} \\) in channel d.

    Args:
        readout (`torch.Tensor` of shape `(..., K, N)`): \\( C_t \\).
        states (`torch.Tensor` of shape `(..., K, M, N)`): \\( h_{td} \\) of M channels of each step.
        weights (`torch.Tensor` of shape `(..., K, M)`): What a squared error of each output counts; not negative.
        held_out (`torch.Tensor` of shape `(..., K)`, bool): The steps that a fit is judged by.

    Raises:
        DimensionError: The shapes do not fit.
        NotFiniteError: An entry is NaN or infinite.
    """

    readout: torch.Tensor
    states: torch.Tensor
    weights: torch.Tensor
    held_out: torch.Tensor

    def __post_init__(self) -> None:
        shape = self.readout.shape
        fits = self.states.ndim == self.readout.ndim + 1 and (*self.states.shape[:-2], self.states.shape[-1]) == shape
        if not fits or self.weights.shape != self.states.shape[:-1] or self.held_out.shape != shape[:-1]:
            found = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
            raise DimensionError(
                f"the shapes of the samples do not fit: {found}; they must be readout (..., K, N), states (..., K, M, "
                "N), weights (..., K, M) and held_out (..., K)."
            )
        for name in ("readout", "states", "weights"):
            require_finite(name, getattr(self, name))

    def each(self) -> list[OutputSamples]:
        """Those of every system of a batch."""
        flat = [getattr(self, field.name) for field in fields(self)]
        return [OutputSamples(*one) for one in zip(*(part.flatten(0, self.readout.ndim - 3) for part in flat))]


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
    if samples.readout.shape[-1] != truncation.full_size or samples.readout.ndim != truncation.T.ndim:
        raise DimensionError(
            f"the samples have readouts of shape {tuple(samples.readout.shape)}, and T has {tuple(truncation.T.shape)};"
            " they must be of the same systems, with N entries."
        )
    if truncation.state_size == truncation.full_size:
        return truncation
    size = truncation.T.shape[-2:]
    pairs = zip(truncation.T.reshape(-1, *size), truncation.W.reshape(-1, *size))
    parts = [samples] if samples.readout.ndim == 2 else samples.each()
    fitted = [_fitted(T, W, part, ridge) for (T, W), part in zip(pairs, parts)]
    return replace(truncation, T=torch.stack(fitted).reshape(truncation.T.shape))


def _fitted(T: torch.Tensor, W: torch.Tensor, samples: OutputSamples, ridge: float) -> torch.Tensor:
    """The fitted `T` of one system, of the dtype and on the device of the given one."""
    double = {"dtype": torch.float64, "device": samples.states.device}
    basis = _free_directions(W.to(**double), samples.states)
    problem = _LeastSquares.of(T.to(**double), W.to(**double), basis, samples)
    held_out, last = samples.held_out, None
    if held_out.any():
        seen, unseen = problem.part(~held_out), problem.part(held_out)
        last = _best(unseen.error(found) for found in seen.iterates(ridge))
    # All samples together can converge in fewer steps than a part of them.
    *_, found = islice(problem.iterates(ridge), None if last is None else last + 1)
    return T + (basis @ found).to(T)


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


@dataclass(frozen=True)
class _LeastSquares:
    r"""
    What is left of the outputs, and the features \\( f_t^\top Y z_{td} \\) that explain it, with the channels summed.

    Args:
        free (`torch.Tensor` of shape `(K, n)`): \\( f_t \\), the readout in the directions that `T` may change in.
        states (`torch.Tensor` of shape `(K, r, r)`): \\( \sum_d w_{td} z_{td} z_{td}^\top \\) of the kept states.
        left (`torch.Tensor` of shape `(K, r)`): \\( \sum_d w_{td} z_{td} \\) times what is left of the output.
        energy (`torch.Tensor` of shape `(K,)`): \\( \sum_d w_{td} \\) times the square of what is left.
        weights (`torch.Tensor` of shape `(K,)`): \\( \sum_d w_{td} \\).
    """

    free: torch.Tensor
    states: torch.Tensor
    left: torch.Tensor
    energy: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, T: torch.Tensor, W: torch.Tensor, basis: torch.Tensor, samples: OutputSamples) -> _LeastSquares:
        # The widened copy of a few steps at a time; a GPU would wait for the next of few.
        chunk = _CHUNK if samples.states.device.type == "cpu" else 16 * _CHUNK
        parts = (part.split(chunk) for part in (samples.readout, samples.states, samples.weights))
        chunks = [cls._of_chunk(T, W, basis, *(part.to(T) for part in chunk)) for chunk in zip(*parts)]
        return cls(*(torch.cat(found) for found in zip(*chunks)))

    @staticmethod
    def _of_chunk(
        T: torch.Tensor,
        W: torch.Tensor,
        basis: torch.Tensor,
        readout: torch.Tensor,
        states: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        kept = states @ W
        left = _outputs(readout, states) - _outputs(readout @ T, kept)
        weighted = weights.unsqueeze(-1) * kept
        of_left = (left.unsqueeze(-2) @ weighted).squeeze(-2)
        energy = (weights * left.square()).sum(-1)
        return readout @ basis, weighted.mT @ kept, of_left, energy, weights.sum(-1)

    def part(self, steps: torch.Tensor) -> _LeastSquares:
        """That of some of the steps."""
        return _LeastSquares(*(getattr(self, field.name)[steps] for field in fields(self)))

    def error(self, Y: torch.Tensor) -> float:
        """The weighted sum of squares of what `Y` leaves."""
        read = self.free @ Y
        return float(
            (self.energy - 2 * (read * self.left).sum(-1) + (read * _outputs(read, self.states)).sum(-1)).sum()
        )

    def iterates(self, ridge: float) -> Iterator[torch.Tensor]:
        """Preconditioned conjugate gradients on the normal equations: zero first, then one solution after the other."""
        solution = self.left.new_zeros(self.free.shape[-1], self.left.shape[-1])
        yield solution
        total = self.weights.sum()
        if not total > 0:
            return
        R = self.free.mT @ (self.weights.unsqueeze(-1) * self.free) / total
        Z = self.states.sum(0) / total
        inverses = [solve(_raised(M), torch.eye(len(M)).to(M)) for M in (R, Z)]
        residual = self.free.mT @ self.left / total
        direction = scaled = inverses[0] @ residual @ inverses[1]
        norm = first = (residual * scaled).sum()
        for _ in range(_ITERATIONS):
            image = self.free.mT @ _outputs(self.free @ direction, self.states) / total + ridge * R @ direction @ Z
            curvature = (direction * image).sum()
            if not (norm > _CONVERGED * first and curvature > 0):
                return
            solution = solution + norm / curvature * direction
            residual = residual - norm / curvature * image
            yield solution
            scaled = inverses[0] @ residual @ inverses[1]
            before, norm = norm, (residual * scaled).sum()
            direction = scaled + norm / before * direction


def _best(errors: Iterator[float]) -> int:
    """The place of the least error, up to where several in a row have brought nothing less."""
    best, least = 0, math.inf
    for place, error in enumerate(errors):
        if error < least:
            best, least = place, error
        elif place - best >= _PATIENCE:
            break
    return best


def _raised(gramian: torch.Tensor) -> torch.Tensor:
    scale = gramian.diagonal().mean()
    return gramian + (_FLOOR * torch.where(scale > 0, scale, 1)) * torch.eye(len(gramian)).to(gramian)


def _outputs(readout: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """What `(K, n)` reads from `(K, M, n)`, `(K, M)`."""
    return (states @ readout.unsqueeze(-1)).squeeze(-1)
