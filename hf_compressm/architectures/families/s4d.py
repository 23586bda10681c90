r"""
S4D: one complex diagonal system with a single input and output in each channel of a layer.

\\( \dot h = A \odot h + 1 u, y = 2 \mathrm{Re}(C h) + D u \\), discretised with the channel's time step. All
channels are cut to one size, in one batched call. Only the product of input and readout weight matters, so all of it
goes into C.

Source of the layer: Gu et al., 2022, "On the Parameterization and Initialization of Diagonal State Space Models"
(arXiv 2206.11893).
"""

from __future__ import annotations

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
class S4DLayer(TimeInvariantLayer):
    """An S4D layer of `hf_compressm.models.sequence`, also where its code came with a checkpoint."""

    family = "s4d"
    parameter_names = ("A_real_log", "A_imag", "C")
    complex_parameters = ("C",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module has the family's parameters and sizes, and a discretisation that is known."""
        return super().matches(module) and getattr(module, "discretization", None) in ("zoh", "bilinear")

    def axes(self) -> tuple[StateAxis, ...]:
        """The second axis of each parameter; every channel has states of its own."""
        channels = self.module.D.shape[0]
        return tuple(
            StateAxis(name, 1, runs(), others=(channels, 2) if name == "C" else (channels,), batched=True)
            for name in self.parameter_names
        )

    def system_of(self, module: nn.Module) -> DiagonalLTI:
        """The systems that a module of this family computes, a batch of channels, with the gradient cut off."""
        lam, C = (tensor.detach() for tensor in module.system())
        D = module.D.detach().view(-1, 1, 1)
        return DiagonalLTI(lam, torch.ones_like(lam).unsqueeze(-1), C.unsqueeze(-2), D)

    def written(self, reduced: DiagonalLTI) -> dict[str, Tensor]:
        """The parameters of reduced systems: poles in continuous time again, and the whole weight of a state in C."""
        A, input_weight = self._continuous(clamped_poles(reduced.lam))
        C = reduced.C.squeeze(-2) * reduced.B.squeeze(-1) / (2 * input_weight)
        return {
            "A_real_log": torch.log(-A.real),
            "A_imag": A.imag.contiguous(),
            "C": torch.view_as_real(C.resolve_conj()),
        }

    def readout_parameter(self, C: Tensor) -> Tensor:
        """The readouts without the factor 2 and the weights that the discretisation gives to the inputs."""
        input_weight = self._continuous(self.system().lam)[1]
        return torch.view_as_real((C.squeeze(-2) / (2 * input_weight)).resolve_conj())

    def _continuous(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The A of discrete poles, and the weight that the discretisation gives to an input of weight 1."""
        dt = torch.exp(self.module.log_dt.detach().to(lam.device, torch.float64)).unsqueeze(-1)
        if self.module.discretization == "bilinear":
            A = 2 / dt * (lam - 1) / (lam + 1)
            return A, 2 * dt / (2 - dt * A)
        A = torch.complex(torch.log(lam.abs()), lam.angle()) / dt
        return A, (lam - 1) / A

    def moment_maps(self, truncation: Truncation, values: Mapping[str, Tensor]) -> dict[str, AxisMap]:
        r"""
        The gradient of C moves with \\( W^\top \\), rescaled by the weights of the states' inputs.

        The state that the new layer computes has an input of weight 1: it is \\( W^H h \\) divided by \\( W^H 1 \\).

        Args:
            truncation ([`~systems.Truncation`]): The cut, one for each channel.
            values (`Mapping[str, torch.Tensor]`): What [`~S4DLayer.written`] gave.
        """
        system = self.system().to(values["C"].device)
        old_weight = self._continuous(system.lam)[1]
        new_A = torch.complex(-torch.exp(values["A_real_log"]), values["A_imag"])
        dt = torch.exp(self.module.log_dt.detach().to(values["C"])).unsqueeze(-1)
        if self.module.discretization == "bilinear":
            new_weight = 2 * dt / (2 - dt * new_A)
        else:
            new_weight = (torch.exp(dt * new_A) - 1) / new_A
        input_weight = truncation.W.mH.sum(-1)
        present = input_weight.abs() > 0
        factor = torch.where(present, new_weight / torch.where(present, input_weight, 1), 0).conj()
        to_C = factor.unsqueeze(-1) * truncation.W.mT / old_weight.conj().unsqueeze(-2)
        return {"C": ModalMap(1, to_C, has_pairs=True)}
