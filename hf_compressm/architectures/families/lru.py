r"""
The LRU: one complex diagonal system with many inputs and outputs in each layer.

\\( h_t = \lambda \odot h_{t-1} + e^\gamma \odot B u_t, y_t = \mathrm{Re}(C h_t) + D \odot u_t \\) with
\\( \lambda = e^{-e^\nu + i e^\theta} \\). The system is truncated as the complex one: the error of its real part is
never larger.

Source of the layer: Orvieto et al., 2023, "Resurrecting Recurrent Neural Networks for Long Sequences"
(arXiv 2303.06349).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...systems import DiagonalLTI, Truncation
from ..moment_maps.axis import AxisMap
from ..moment_maps.modal import ModalMap
from ..registry import register
from ..state_layout import StateAxis, runs
from .time_invariant import TimeInvariantLayer, clamped_poles


@register
class LRULayer(TimeInvariantLayer):
    """A linear recurrent unit of `hf_compressm.models.sequence`, also where its code came with a checkpoint."""

    family = "lru"
    parameter_names = ("nu_log", "theta_log", "gamma_log", "B", "C")
    complex_parameters = ("B", "C")

    def axes(self) -> tuple[StateAxis, ...]:
        """The rows of B, the columns of C, and the vectors."""
        width = self.module.D.shape[0]
        vectors = [StateAxis(name, 0, runs()) for name in ("nu_log", "theta_log", "gamma_log")]
        return (*vectors, StateAxis("B", 0, runs(), others=(width, 2)), StateAxis("C", 1, runs(), others=(width, 2)))

    def system_of(self, module: nn.Module) -> DiagonalLTI:
        """The system that a module of this family computes, without its feedthrough D, which no cut changes."""
        lam, B, C = module.system()
        return DiagonalLTI(lam.detach(), B.detach(), C.detach())

    def written(self, reduced: DiagonalLTI) -> dict[str, Tensor]:
        r"""
        The parameters of a reduced system, angles in \\( (0, 2 \pi] \\).

        A state's scale is free between gamma, its row of B and its column of C. The rows of B get the length that those
        of the layer have on average, so that an optimizer's step means about the same for them as before. Gamma is
        \\( g \frac{N}{r} \sqrt{1 - |\lambda|^2} \\) for r of N states, where g is the layer's mean of
        \\( \gamma / \sqrt{1 - |\lambda|^2} \\), one at first. Adam changes each entry of C by about its learning rate,
        and the output by the sum over all states. With the factor N / r, by which C is smaller then, r states change it
        as N did; without it, a layer that was cut learns more slowly than before.
        """
        lam = clamped_poles(reduced.lam)
        decay = -torch.log(lam.abs())
        angle = torch.remainder(lam.angle(), 2 * math.pi)
        gamma_log = _gamma_log_of_unit_power(decay) + self._usual_gain() + math.log(self.state_size / lam.shape[0])
        B = reduced.B / torch.exp(gamma_log).unsqueeze(-1)
        scale = self._row_length(B)
        return {
            "nu_log": torch.log(decay),
            "theta_log": torch.log(torch.where(angle > 0, angle, 2 * math.pi)),
            "gamma_log": gamma_log,
            "B": torch.view_as_real(B / scale.unsqueeze(-1)),
            "C": torch.view_as_real((reduced.C * scale).resolve_conj()),
        }

    def readout_parameter(self, C: Tensor) -> Tensor:
        """Real and imaginary parts, as pairs."""
        return torch.view_as_real(C.resolve_conj())

    def _row_length(self, B: Tensor) -> Tensor:
        """What each row of B is divided by to have the root mean square length of the layer's rows."""
        usual = float(self.module.B.detach().double().square().sum((1, 2)).mean().sqrt())
        length = torch.linalg.vector_norm(B, dim=-1)
        return torch.where((length > 0) & (usual > 0), length / usual, 1.0)

    def _usual_gain(self) -> float:
        """The mean logarithm of gamma, relative to that which gives states the power of the input."""
        decay = torch.exp(self.module.nu_log.detach().double()).clamp_min(torch.finfo(torch.float64).tiny)
        return float((self.module.gamma_log.detach().double() - _gamma_log_of_unit_power(decay)).mean())

    def moment_maps(self, truncation: Truncation, values: Mapping[str, Tensor]) -> dict[str, AxisMap]:
        r"""
        Gradients of B move with \\( T^H \\) and those of C with \\( W^\top \\), rescaled as their parameters are.

        With \\( h \approx T h_r \\) and \\( h_r = W^H h \\): the gradient of the effective B is
        \\( \sum_t g_t u_t^\top \\) with the adjoint state \\( g \\), and \\( g_r = T^H g \\); that of C is
        \\( \sum_t \bar y_t h_t^H \\).

        Args:
            truncation ([`~systems.Truncation`]): The cut.
            values (`Mapping[str, torch.Tensor]`): What [`~LRULayer.written`] gave.
        """
        # W^H B gamma = scale gamma_r B_r, row by row, shows the scale that was chosen.
        B, gamma_log = (getattr(self.module, name).detach().to(values["B"]) for name in ("B", "gamma_log"))
        gamma, new_gamma = torch.exp(gamma_log), torch.exp(values["gamma_log"])
        effective = truncation.W.mH @ (gamma.unsqueeze(-1) * torch.view_as_complex(B))
        new = torch.linalg.vector_norm(torch.view_as_complex(values["B"].contiguous()), dim=-1)
        length = torch.linalg.vector_norm(effective, dim=-1) / new_gamma
        scale = torch.where(new > 0, length / torch.where(new > 0, new, 1), 1.0)
        to_B = (scale * new_gamma).unsqueeze(-1) * truncation.T.mH / gamma
        to_C = truncation.W.mT / scale.unsqueeze(-1)
        return {"B": ModalMap(0, to_B, has_pairs=True), "C": ModalMap(1, to_C, has_pairs=True)}


def _gamma_log_of_unit_power(decay: Tensor) -> Tensor:
    r"""The logarithm of \\( \sqrt{1 - |\lambda|^2} \\), with which white noise gives a state its own power."""
    return 0.5 * torch.log(-torch.expm1(-2 * decay))
