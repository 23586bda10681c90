"""Sampled steps of systems that are read by another vector at each step: what their readout can be fitted to."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ..errors import DimensionError
from ._validation import require_finite


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
