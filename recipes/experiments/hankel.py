"""Hankel nuclear-norm regularisation: the sum of every layer's Hankel singular values becomes a part of the loss.

Small singular values vanish in training, and truncation after it costs less. Sources: Forgione, Mejari and Piga, *Model
order reduction of deep structured state-space models* (2024, arXiv 2403.14833); Schwerdtner et al. (2025, arXiv
2510.22951). Both differentiate through the eigenvalues of `P Q`; [`hankel_nuclear_norm`] has the same value and the
same gradient from one singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import Trainer

from hf_compressm.systems import DiagonalLTI

from .cost import Stopwatch
from .layer_systems import layer_systems


def hankel_nuclear_norm(system: DiagonalLTI) -> Tensor:
    r"""
    The sum of a system's Hankel singular values, differentiable in `lam`, `B` and `C`.

    With the balancing matrices `T = L_P V S^{-1/2}` and `W = L_Q U S^{-1/2}`, `W^H P W = T^H Q T = S`, a small change
    moves `sigma_i` by half the changes of both diagonals, `(W^H dP W)_ii / 2 + (T^H dQ T)_ii / 2`: to first order
    the off-diagonal entries do not matter. So `tr(W W^H P) / 2 + tr(T T^H Q) / 2` with `W` and `T` held fixed has the
    value and the gradient of the sum. Singular values that are rounding errors are left out: there the sum has a kink,
    and zero is one of its subgradients.

    Args:
        system ([`DiagonalLTI`]): One system or a batch; its tensors may require gradients.

    Returns:
        `torch.Tensor`: `(...)`, float64, one sum a system.
    """
    with torch.no_grad():
        found = system.hankel_decomposition()
        rank = found.usable_rank
        kept = torch.arange(found.sigma.shape[-1], device=found.sigma.device) < rank[..., None]
        scale = torch.where(kept, found.sigma, 1).rsqrt() * kept
        T = (found.L_P @ found.V) * scale.unsqueeze(-2)
        W = (found.L_Q @ found.U) * scale.unsqueeze(-2)
        weight_P, weight_Q = W @ W.mH, T @ T.mH
    P, Q = system.controllability_gramian(), system.observability_gramian()
    return ((weight_P.conj() * P).real + (weight_Q.conj() * Q).real).sum((-2, -1)) / 2


@dataclass(frozen=True)
class HankelPenalty:
    """
    `weight` times the sum of the Hankel singular values of all layers (the mean over channels where a layer has many).

    Args:
        weight (`float`, *optional*, defaults to 1e-3): Factor in the loss.
    """

    weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"hankel_regularization.weight is {self.weight}; give a positive number.")

    def __call__(self, model: torch.nn.Module) -> Tensor:
        """The penalty of a model, a scalar."""
        return self.weight * sum(hankel_nuclear_norm(system).mean() for system in layer_systems(model).values())


class HankelTrainer(Trainer):
    """
    A Trainer that adds the penalty to the loss of every training step, and measures what the penalty takes.

    Args:
        penalty ([`HankelPenalty`]): What is added.
        arguments: Of the Trainer.
    """

    def __init__(self, *arguments: Any, penalty: HankelPenalty, stopwatch: Stopwatch, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.penalty, self.stopwatch = penalty, stopwatch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus the penalty."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            loss = loss + self._penalty(model).to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def _penalty(self, model: torch.nn.Module) -> Tensor:
        """The penalty, whose gradients are computed here so that the stopwatch sees all of its work."""
        model = self.accelerator.unwrap_model(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self.stopwatch:
            value = self.penalty(model)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        moved = [(p, g) for p, g in zip(parameters, gradients) if g is not None]
        return _WithGradients.apply(value.detach(), *(g for _, g in moved), *(p for p, _ in moved))


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *gradients_and_parameters: Tensor) -> Tensor:
        half = len(gradients_and_parameters) // 2
        ctx.save_for_backward(*gradients_and_parameters[:half])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(None for _ in gradients), *((grad * g).to(g.dtype) for g in gradients))
