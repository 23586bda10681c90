"""The least-squares problem of a readout that is fitted to outputs, and conjugate gradients on its normal equations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from .._decompositions import solve
from ..output_samples import OutputSamples

_ITERATIONS = 100
_CHUNK = 64
# Iterations without a smaller error on the held-out steps after which no more is expected.
_PATIENCE = 8
# Of the first step of the iteration, in the squared norm that it reduces.
_CONVERGED = 1e-8
# What keeps the preconditioner invertible where states are dependent.
_FLOOR = 1e-9


@dataclass(frozen=True)
class OutputLeastSquares:
    r"""
    What is left of the outputs, and the features \\( f_t^\top Y z_{td} \\) that explain it, with the channels summed.

    Of one system, or of several along a first axis.

    Args:
        free (`torch.Tensor` of shape `(..., K, n)`): \\( f_t \\), the readout in the directions that `T` may change in.
        states (`torch.Tensor` of shape `(..., K, r, r)`): \\( \sum_d w_{td} z_{td} z_{td}^\top \\) of the kept states.
        left (`torch.Tensor` of shape `(..., K, r)`): \\( \sum_d w_{td} z_{td} \\) times what is left of the output.
        energy (`torch.Tensor` of shape `(..., K)`): \\( \sum_d w_{td} \\) times the square of what is left.
        weights (`torch.Tensor` of shape `(..., K)`): \\( \sum_d w_{td} \\).
    """

    free: torch.Tensor
    states: torch.Tensor
    left: torch.Tensor
    energy: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, T: torch.Tensor, W: torch.Tensor, basis: torch.Tensor, samples: OutputSamples) -> OutputLeastSquares:
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
        left = outputs_of(readout, states) - outputs_of(readout @ T, kept)
        weighted = weights.unsqueeze(-1) * kept
        of_left = (left.unsqueeze(-2) @ weighted).squeeze(-2)
        energy = (weights * left.square()).sum(-1)
        return readout @ basis, weighted.mT @ kept, of_left, energy, weights.sum(-1)

    @classmethod
    def together(cls, problems: Sequence[OutputLeastSquares]) -> OutputLeastSquares:
        """Systems of one size along a new first axis."""
        return cls(*(torch.stack([getattr(one, field.name) for one in problems]) for field in fields(cls)))

    def split(self, held_out: torch.Tensor) -> tuple[OutputLeastSquares, OutputLeastSquares]:
        """
        The steps that are not held out, and those that are; of several systems, as many of each as of all others.

        held_out: (systems, K), bool.
        """
        counts = held_out.sum(1)
        unseen, seen = int(counts.min()), held_out.shape[1] - int(counts.max())
        order = held_out.int().argsort(dim=1, stable=True)
        return self._steps(order[:, :seen]), self._steps(order[:, held_out.shape[1] - unseen :])

    def _steps(self, steps: torch.Tensor) -> OutputLeastSquares:
        parts = [getattr(self, field.name) for field in fields(self)]
        return OutputLeastSquares(*(part.take_along_dim(_as_index(steps, part), dim=1) for part in parts))

    def error(self, Y: torch.Tensor) -> torch.Tensor:
        """The weighted sum of squares of what `Y` leaves, `(systems,)`."""
        read = self.free @ Y
        explained = 2 * (read * self.left).sum(-1) - (read * outputs_of(read, self.states)).sum(-1)
        return (self.energy - explained).sum(-1)

    def iterates(self, ridge: float) -> Iterator[torch.Tensor]:
        """
        Preconditioned conjugate gradients on the normal equations: zero first, then one solution after the other.

        Each is (systems, n, r). A system that has converged keeps its solution; the last comes when all have.
        """
        solution = self.left.new_zeros(len(self.left), self.free.shape[-1], self.left.shape[-1])
        yield solution
        weight = self.weights.sum(-1)
        total = torch.where(weight > 0, weight, 1)[:, None, None]
        R = self.free.mT @ (self.weights.unsqueeze(-1) * self.free) / total
        Z = self.states.sum(1) / total
        inverses = [solve(_raised(M), torch.eye(M.shape[-1]).to(M).expand_as(M)) for M in (R, Z)]
        residual = self.free.mT @ self.left / total
        direction = scaled = inverses[0] @ residual @ inverses[1]
        norm = first = _inner(residual, scaled)
        alive = (weight > 0)[:, None, None]
        for _ in range(_ITERATIONS):
            image = self.free.mT @ outputs_of(self.free @ direction, self.states) / total + ridge * R @ direction @ Z
            curvature = _inner(direction, image)
            alive = alive & (norm > _CONVERGED * first) & (curvature > 0)
            if not alive.any():
                return
            step = torch.where(alive, norm / curvature, 0)
            solution = solution + step * direction
            residual = residual - step * image
            yield solution
            scaled = inverses[0] @ residual @ inverses[1]
            before, norm = norm, _inner(residual, scaled)
            direction = scaled + torch.where(alive, norm / before, 0) * direction


def _as_index(steps: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return steps.reshape(*steps.shape, *(1,) * (part.ndim - steps.ndim))


def _inner(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The inner product of each system's matrices, `(systems, 1, 1)`."""
    return (one * other).sum((-2, -1), keepdim=True)


def best_iteration(errors: Iterator[torch.Tensor]) -> torch.Tensor:
    """The place of each system's least error, up to where several in a row have brought nothing less; `(systems,)`."""
    best = least = torch.empty(0)
    for place, error in enumerate(errors):
        if place == 0:
            best, least = torch.zeros_like(error, dtype=torch.int64), torch.full_like(error, math.inf)
        better = (error < least) & (place - best <= _PATIENCE)
        best, least = torch.where(better, place, best), torch.where(better, error, least)
        if bool((place - best >= _PATIENCE).all()):
            break
    return best


def _raised(gramian: torch.Tensor) -> torch.Tensor:
    scale = gramian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return gramian + (_FLOOR * torch.where(scale > 0, scale, 1)) * torch.eye(gramian.shape[-1]).to(gramian)


def outputs_of(readout: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """What `(..., K, n)` reads from `(..., K, M, n)`, `(..., K, M)`."""
    return (states @ readout.unsqueeze(-1)).squeeze(-1)
