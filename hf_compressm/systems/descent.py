"""Descent on the matrices of a smaller system, to what a larger one gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of the mean eigenvalue: directions that were hardly seen are not stretched without end.
_LEAST_VARIANCE = 1e-2
MOST_ENTRIES = 2048
"""An eigendecomposition of more entries takes longer than what it saves."""
_ROUNDS = 12
_STEPS = 5
_HISTORY = 20
# Of the outputs' own energy; a system that is nearer than this is the same one up to rounding.
_NOTHING_LEFT = 1e-9

Judge = Callable[[list[Tensor]], tuple[float, float, list[Tensor]]]
"""Takes matrices; returns the error that is to become small, that of what is held out, and the first one's gradient."""


def descend(judge: Judge, start: Sequence[Tensor], roots: Sequence[Tensor | None]) -> list[Tensor]:
    r"""
    Matrices with a smaller error, looked for from a start by the limited-memory BFGS method.

    The descent runs in coordinates z, \\( M = M_0 + R z \\). Where R is the inverse root of the covariance of what the
    matrix multiplies, the curvature is nearly the same in all directions. It ends where the held-out error has stopped
    falling.

    Args:
        judge (`Callable`): Says how good matrices are. The errors are relative to the energy of the outputs.
        start (`Sequence[torch.Tensor]` of shapes `(..., n, r)`): The matrices to begin with.
        roots (`Sequence[torch.Tensor | None]` of shapes `(..., n, m)`): R of each; the identity when None.

    Returns:
        `list[torch.Tensor]`: Those with the smallest held-out error that were met; the start itself where none is
            better, where its error is nothing but rounding, and where an error is not finite.

    Source: Nocedal and Wright, 2006, "Numerical Optimization", algorithm 7.5.

    Example:

    ```python
    >>> wanted = torch.ones(4, 2)
    >>> def judge(matrices):
    ...     distance = matrices[0] - wanted
    ...     return float(distance.square().sum()), float(distance.square().sum()), [2 * distance]
    >>> found = descend(judge, [torch.zeros(4, 2)], [None])[0]
    >>> torch.allclose(found, wanted)
    True

    ```
    """
    best = list(start)
    first, known, _ = judge(best)
    if not (_NOTHING_LEFT < known < float("inf") and _NOTHING_LEFT < first < float("inf")):
        return best
    z = [torch.zeros_like(M if R is None else R.mT @ M) for M, R in zip(start, roots)]
    optimizer = torch.optim.LBFGS(
        z, max_iter=_STEPS, history_size=_HISTORY, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure() -> float:
        nonlocal best, known
        matrices = [M + (step if R is None else R @ step) for M, R, step in zip(start, roots, z)]
        error, held_out, gradient = judge(matrices)
        if held_out < known:
            best, known = matrices, held_out
        # The first step of the method has the length of the gradient, which should not hang on the error's size.
        for step, R, slope in zip(z, roots, gradient):
            step.grad = (slope if R is None else R.mT @ slope) / first
        return error / first

    with torch.no_grad():
        for _ in range(_ROUNDS):
            before = known
            optimizer.step(closure)
            if not known < before:
                break
    return best


def inverse_root(moment: Tensor) -> Tensor | None:
    r"""
    \\( C^{-1/2} \\) of a second moment C, scaled so that its mean diagonal entry is one.

    Args:
        moment (`torch.Tensor` of shape `(..., n, n)`): Positive semidefinite.

    Returns:
        `torch.Tensor` or `None`: Float64; None where the moment is not finite or zero, or of more than `MOST_ENTRIES`.
    """
    if moment.shape[-1] > MOST_ENTRIES or not torch.isfinite(moment).all():
        return None
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0) + _LEAST_VARIANCE * values.mean(-1, keepdim=True)
    if not (values > 0).all():
        return None
    root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root / root.diagonal(dim1=-2, dim2=-1).mean()
