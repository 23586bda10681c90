"""What is known of one layer's input-output energy: its spectrum, a score for each state, and the truncations.

Three kinds share one interface. [`EmpiricalGramians`] are sums over calibration data, for selective layers;
[`ClosedFormGramians`] are those of a time-invariant layer's own system, which needs no data; [`WeightedGramians`] are
those of its system under the inputs of the calibration data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...architectures import MeasuredTruncation
from ...config import CompreSSMConfig
from ...systems import (
    COARSE_RESOLUTION,
    DiagonalLTI,
    HankelDecomposition,
    OutputSamples,
    StateChoice,
    Truncation,
    diagonal_hankel_scores,
    hankel_decomposition,
    interpolation_residual,
    project,
    registered_reductors,
    weighted_hankel_decomposition,
)


class LayerGramians(ABC):
    """The Gramians of one layer, in whatever form they are known."""

    @abstractmethod
    def on_cpu(self) -> LayerGramians:
        """
        The same on the CPU, which decomposes small matrices faster than a GPU can be asked to.

        Samples stay where they are.
        """

    @abstractmethod
    def hankel_singular_values(self) -> Tensor:
        """The layer's Hankel singular values, `(N,)` float64, descending."""

    @abstractmethod
    def state_scores(self) -> Tensor:
        """The Hankel singular value that each state would have if it were alone, `(..., N)` float64."""

    @abstractmethod
    def scores_after(self, truncation: Truncation) -> Tensor:
        """The scores of the states that a truncation of this layer leaves, `(..., r)` float64."""

    def lost_energy(self, truncation: Truncation) -> float | None:
        """The share of the layer's energy that a truncation loses, where the spectrum alone does not determine it."""
        return None

    form: ClassVar[str]
    """How the Gramians were found; `"measured"` for a selective layer, else a value of `CompreSSMConfig.gramians`."""

    is_weighted: ClassVar[bool] = False
    """Whether a known system's Gramians are those of the inputs that it sees, not of white noise."""

    def attempts(self, reductor: str) -> list[tuple[LayerGramians, str]]:
        """What to truncate by and how, in the order in which to try: the next where one fails its checks."""
        return [(self, reductor)]

    def alternatives(self, reductor: str) -> dict[str, LayerGramians]:
        """The Gramians that a truncation can be made by, by a name for each; what is asked for comes first."""
        return {"": self}

    def samples_for(self, reductor: str) -> OutputSamples | None:
        """Sampled steps that the readout of such a truncation may be fitted to; None where there are none."""
        return None

    def truncate(self, rank: int, reductor: str, config: CompreSSMConfig, seed: int = 0) -> Truncation:
        """
        Cut the layer's state.

        Args:
            rank (`int`): States to keep, between 1 and N (in every group).
            reductor (`str`): The name of one of the layer's reductors.
            config ([`CompreSSMConfig`]): Names the score and the rule of a selection.
            seed (`int`, *optional*, defaults to 0): Seed of the rule `"random"`.

        Raises:
            [`~errors.TruncationError`]: the truncation failed one of its own checks.
        """
        choice = StateChoice(config.selection_score, config.selection_rule, seed)
        return registered_reductors()[reductor].truncate(self, rank, choice)


@dataclass(frozen=True)
class EmpiricalGramians(LayerGramians):
    r"""
    The Gramians of a selective layer, as means over the observed states.

    A layer whose state falls into groups with nothing in common has one pair a group and a joint spectrum: its i-th
    value is the sum of the groups' i-th Hankel singular values, as every group keeps the same number of states.

    Args:
        P (`torch.Tensor` of shape `(N, N)` or `(groups, N, N)`, float64): Mean of \\( h h^\top \\), the
            controllability Gramian.
        Q (`torch.Tensor` of the same shape, float64): Mean of \\( g g^\top \\), the observability Gramian; its scale
            is that of the loss (or of the probe), so only ratios carry meaning.
        readout_energy (`torch.Tensor` of shape `(N,)` or `(groups, N)`, float64): Mean of \\( h_n^2 C_n^2 \\).
        R (`torch.Tensor` of the shape of `P`, float64): Mean of \\( C C^\top \\), the readout Gramian: what a state is
            worth to the output of its own step. The states that a cut keeps move as before, so that it changes each
            output by what the dropped states add to it in that step, and nothing later.
        squares (`torch.Tensor` of shape `(2, N)` or `(groups, 2, N)`, float64, *optional*): Means of \\( B_n^2 \\) and
            of \\( C_n^2 \\), which every truncation takes along.
        samples ([`~systems.OutputSamples`], *optional*): Sampled steps that the readout of a truncation is fitted to,
            where it may read what is dropped through what is kept.
    """

    P: Tensor
    Q: Tensor
    readout_energy: Tensor
    R: Tensor
    squares: Tensor | None = None
    samples: OutputSamples | None = None
    system: ClassVar[None] = None
    form: ClassVar[str] = "measured"

    def on_cpu(self) -> EmpiricalGramians:
        """The same with all Gramians on the CPU."""
        names = ("P", "Q", "readout_energy", "R", "squares")
        known = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if value is None else value.cpu() for name, value in known.items()})

    @cached_property
    def decomposition(self) -> HankelDecomposition:
        """The square-root decomposition of both Gramians."""
        return hankel_decomposition(self.P, self.Q)

    def hankel_singular_values(self) -> Tensor:
        """The layer's joint Hankel singular values, `(N,)` float64, descending."""
        return self.decomposition.sigma.reshape(-1, self.P.shape[-1]).sum(0)

    def state_scores(self) -> Tensor:
        """The square root of the product of both Gramians' diagonals, `(..., N)` float64."""
        return diagonal_hankel_scores(self.P, self.Q)

    def scores_after(self, truncation: Truncation) -> Tensor:
        """The scores of the states that are left, read as the truncation reads them, `(..., r)` float64."""
        return _scores_after(self, truncation)

    def lost_energy(self, truncation: Truncation) -> float | None:
        """The share of the observable energy `trace(P Q)`, summed over groups, that the truncation loses."""
        return _lost_energy(self, truncation)

    def alternatives(self, reductor: str) -> dict[str, LayerGramians]:
        """What the states do to the loss; or to the output of their own step, with the readout Gramian for Q."""
        return {"": self} if reductor == "selection" else {"": self, "readout_gramian": replace(self, Q=self.R)}

    def truncate(self, rank: int, reductor: str, config: CompreSSMConfig, seed: int = 0) -> MeasuredTruncation:
        """Cut to `rank` states in every group; `reductor`, `config` and `seed` as above. It takes `squares` along."""
        return MeasuredTruncation.of(super().truncate(rank, reductor, config, seed), self.squares)

    def samples_for(self, reductor: str) -> OutputSamples | None:
        """Those that were kept, for what is no mere selection."""
        return None if registered_reductors()[reductor].only_selects else self.samples


@dataclass(frozen=True)
class ClosedFormGramians(LayerGramians):
    r"""
    The Gramians of a time-invariant layer, known from its parameters.

    A layer whose channels are systems of their own (a batch) has a joint spectrum: its i-th value is the sum of the
    channels' i-th Hankel singular values, so that a share of it is a share of the energy of all channels together when
    each of them keeps the same number of states.

    Args:
        system ([`~systems.DiagonalLTI`]): The layer's system, or a batch of them.
    """

    form: ClassVar[str] = "closed_form"

    system: DiagonalLTI

    def on_cpu(self) -> ClosedFormGramians:
        """The same with the system on the CPU."""
        return ClosedFormGramians(self.system.to("cpu"))

    R = readout_energy = None

    @cached_property
    def P(self) -> Tensor:
        """The controllability Gramian, `(..., N, N)` complex128."""
        return self.system.controllability_gramian()

    @cached_property
    def Q(self) -> Tensor:
        """The observability Gramian, `(..., N, N)` complex128."""
        return self.system.observability_gramian()

    @cached_property
    def decomposition(self) -> HankelDecomposition:
        """The square-root decomposition of the system."""
        return self.system.hankel_decomposition(COARSE_RESOLUTION)

    def hankel_singular_values(self) -> Tensor:
        """The layer's joint Hankel singular values, `(N,)` float64, descending."""
        return self.decomposition.sigma.reshape(-1, self.system.order).sum(0)

    def state_scores(self) -> Tensor:
        """The Hankel singular value of each state alone, `(..., N)` float64."""
        return _modal_scores(self.system)

    def scores_after(self, truncation: Truncation) -> Tensor:
        """The scores of the states of the reduced system, `(..., r)` float64."""
        return _modal_scores(project(self.system, truncation))


@dataclass(frozen=True)
class WeightedGramians(LayerGramians):
    r"""
    The Gramians of a time-invariant layer under the inputs that it really sees.

    The joint spectrum of channels is that of [`ClosedFormGramians`].

    Args:
        system ([`~systems.DiagonalLTI`]): The layer's system, or a batch of them.
        P (`torch.Tensor` of shape `(..., N, N)`, complex128): Mean of \\( h h^H \\) over the calibration data.
        measured_Q (`torch.Tensor` of shape `(..., N, N)`, complex128, *optional*): Mean of \\( g g^H \\) over the
            adjoint states of the loss; the closed form, \\( Q = A^H Q A + C^H C \\), is taken when unset.
    """

    system: DiagonalLTI
    P: Tensor
    measured_Q: Tensor | None = None

    is_weighted: ClassVar[bool] = True
    R = readout_energy = None

    @property
    def form(self) -> str:
        """`"loss_gradient"` with a measured Q, else `"input_weighted"`."""
        return "input_weighted" if self.measured_Q is None else "loss_gradient"

    def on_cpu(self) -> WeightedGramians:
        """The same with system and Gramians on the CPU."""
        Q = None if self.measured_Q is None else self.measured_Q.cpu()
        return WeightedGramians(self.system.to("cpu"), self.P.cpu(), Q)

    @cached_property
    def Q(self) -> Tensor:
        """The observability Gramian, `(..., N, N)` complex128."""
        return self.system.observability_gramian() if self.measured_Q is None else self.measured_Q

    @cached_property
    def decomposition(self) -> HankelDecomposition:
        """The square-root decomposition of both Gramians."""
        return weighted_hankel_decomposition(self.system, self.P, self.measured_Q)

    def hankel_singular_values(self) -> Tensor:
        """The layer's joint singular values, `(N,)` float64, descending."""
        return self.decomposition.sigma.reshape(-1, self.system.order).sum(0)

    def state_scores(self) -> Tensor:
        """The square root of the product of both Gramians' diagonals, `(..., N)` float64."""
        return diagonal_hankel_scores(self.P, self.Q)

    def scores_after(self, truncation: Truncation) -> Tensor:
        """The scores of the states that are left, read as the truncation reads them, `(..., r)` float64."""
        return _scores_after(self, truncation)

    def lost_energy(self, truncation: Truncation) -> float | None:
        """The share of the energy `trace(P Q)` on the data, summed over channels, that the truncation loses."""
        return _lost_energy(self, truncation)

    def alternatives(self, reductor: str) -> dict[str, LayerGramians]:
        """With Q of the loss; or with Q in closed form."""
        return {"": self} if self.measured_Q is None else {"": self, "input_weighted": replace(self, measured_Q=None)}

    def attempts(self, reductor: str) -> list[tuple[LayerGramians, str]]:
        """As asked; then with Q in closed form, which is stable for any P; then interpolative, which keeps poles."""
        if reductor != "balanced":
            return [(self, reductor)]
        closed = [] if self.measured_Q is None else [(replace(self, measured_Q=None), reductor)]
        return [(self, reductor), *closed, (self, "interpolative")]


def _scores_after(gramians: EmpiricalGramians | WeightedGramians, truncation: Truncation) -> Tensor:
    # Where a fitted T is large in directions that Q does not see, rounding makes T^H Q T anything but Hermitian and its
    # diagonal negative: the entries alone are taken, and none below zero.
    pairs = ((truncation.W, gramians.P), (truncation.T, gramians.Q))
    variances = ((X.to(M).conj() * (M @ X.to(M))).sum(-2).real.clamp_min(0) for X, M in pairs)
    return diagonal_hankel_scores(*(variance.diag_embed() for variance in variances))


def _lost_energy(gramians: EmpiricalGramians | WeightedGramians, truncation: Truncation) -> float:
    known = gramians.decomposition
    shares = interpolation_residual(gramians.P, gramians.Q, truncation, (known.L_P, known.L_Q))
    energies = known.sigma.square().sum(-1)
    total = float(energies.sum())
    return float((torch.as_tensor(shares).to(energies) * energies).sum()) / total if total else 0.0


def _modal_scores(system: DiagonalLTI) -> Tensor:
    r"""\\( \|b_n\| \|c_n\| / (1 - |\lambda_n|^2) \\), in discrete time: the root of both Gramians' diagonals."""
    scores = system.B.abs().square().sum(-1).sqrt() * system.C.abs().square().sum(-2).sqrt()
    if system.time_domain == "discrete":
        return scores / (1 - system.lam.abs().square())
    return scores / (-2 * system.lam.real)
