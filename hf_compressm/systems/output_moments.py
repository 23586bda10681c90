"""Second moments of the states and outputs of time-invariant systems: what a readout can be fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import DimensionError


@dataclass(frozen=True, eq=False)
class OutputMoments:
    r"""
    Sums over sampled steps of systems with the real output \\( y = \mathrm{Re}(C z) = X^\top \phi \\).

    The features \\( \phi \\) are the real parts of the r states and their negated imaginary parts, and \\( X \\) holds
    the real parts of C over its imaginary ones.

    Args:
        features (`torch.Tensor` of shape `(..., 2 r, 2 r)`, float64): \\( \sum \phi \phi^\top \\).
        cross (`torch.Tensor` of shape `(..., 2 r, H)`, float64): \\( \sum \phi y^\top \\).
        energy (`torch.Tensor` of shape `(...)`, float64): \\( \sum \|y\|^2 \\).
    """

    features: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, outputs: torch.Tensor) -> OutputMoments:
        """
        The moments of some steps.

        Args:
            states (`torch.Tensor` of shape `(..., K, r)`): \\( z \\), complex.
            outputs (`torch.Tensor` of shape `(..., K, H)`): \\( y \\), real.

        Raises:
            DimensionError: The shapes do not fit.
        """
        if states.shape[:-1] != outputs.shape[:-1]:
            raise DimensionError(
                f"the states have shape {tuple(states.shape)} and the outputs {tuple(outputs.shape)}; they must be "
                "(..., K, r) and (..., K, H)."
            )
        rows = torch.cat([states.real, -states.imag], dim=-1).double()
        outputs = outputs.to(rows)
        return cls(rows.mT @ rows, rows.mT @ outputs, outputs.square().sum((-2, -1)))

    @classmethod
    def zeros(
        cls, batch: tuple[int, ...], size: int, outputs: int, device: torch.device | None = None
    ) -> OutputMoments:
        """The moments of no step at all, of systems of `size` states and `outputs` outputs."""
        shapes = ((*batch, 2 * size, 2 * size), (*batch, 2 * size, outputs), batch)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def __add__(self, other: OutputMoments) -> OutputMoments:
        """The moments of the steps of both."""
        return OutputMoments(self.features + other.features, self.cross + other.cross, self.energy + other.energy)

    def flattened(self) -> torch.Tensor:
        """All numbers one after the other, as they can be summed over processes."""
        return torch.cat([self.features.flatten(), self.cross.flatten(), self.energy.flatten()])

    def like(self, flat: torch.Tensor) -> OutputMoments:
        """Moments of these shapes from what [`~OutputMoments.flattened`] gave."""
        parts = (self.features, self.cross, self.energy)
        split = flat.split([part.numel() for part in parts])
        return OutputMoments(*(numbers.reshape(part.shape) for numbers, part in zip(split, parts)))

    def error(self, C: torch.Tensor) -> torch.Tensor:
        r"""
        \\( \sum \|y - \mathrm{Re}(C z)\|^2 \\) of a readout, as far as its rounding lets it be known.

        Args:
            C (`torch.Tensor` of shape `(..., H, r)`): Readout, complex.

        Returns:
            `torch.Tensor` of shape `(...)`, float64.
        """
        X = real_readout(C)
        return self.energy + (X * (self.features @ X - 2 * self.cross)).sum((-2, -1))


def real_readout(C: torch.Tensor) -> torch.Tensor:
    """`(..., 2 r, H)` float64 of a complex readout `(..., H, r)`."""
    return torch.cat([C.real, C.imag], dim=-1).mT.double()


def complex_readout(X: torch.Tensor) -> torch.Tensor:
    """The inverse of [`real_readout`]."""
    real, imaginary = X.mT.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())
