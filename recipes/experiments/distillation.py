"""Knowledge distillation: a small student learns a teacher's logits (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer


@dataclass(frozen=True)
class DistillationLoss:
    """
    `(1 - weight) * cross entropy + weight * T^2 * KL(teacher / T || student / T)`, equation 1 and section 2 there.

    Args:
        temperature (`float`, *optional*, defaults to 2.0): Divides the logits of both; `T`.
        weight (`float`, *optional*, defaults to 0.5): Of the teacher's part, between 0 and 1.
    """

    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature is {self.temperature}; give a positive number.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"distillation.weight is {self.weight}; give a number between 0 and 1.")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss of a batch, from logits `(batch, classes)` and the student's own loss."""
        student = functional.log_softmax(student_logits / self.temperature, dim=-1)
        teacher = functional.log_softmax(teacher_logits / self.temperature, dim=-1)
        divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
        # T^2 keeps the size of this part's gradients when T changes.
        return (1 - self.weight) * cross_entropy + self.weight * self.temperature**2 * divergence


class DistillationTrainer(Trainer):
    """
    A Trainer whose model also learns from a teacher, which runs on every batch.

    Args:
        teacher (`PreTrainedModel`): A trained classifier of the same classes; it is not changed.
        distillation_loss ([`DistillationLoss`]): Weighs the two.
        arguments: Of the Trainer.
    """

    def __init__(
        self, *arguments: Any, teacher: PreTrainedModel, distillation_loss: DistillationLoss, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.distillation_loss = distillation_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, joined with the teacher's opinion."""
        cross_entropy, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        with torch.no_grad():
            teacher = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.distillation_loss(outputs.logits, teacher.logits, cross_entropy)
        return (loss, outputs) if return_outputs else loss
