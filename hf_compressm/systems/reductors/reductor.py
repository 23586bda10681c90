"""What a reductor is, and the registry of all of them: adding one is adding a file that registers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ...errors import ConfigurationError
from ..hankel import HankelDecomposition
from ..lti import DiagonalLTI
from ..truncation import Truncation

SelectionScore = Literal["greedy", "hankel", "readout_energy"]
SelectionRule = Literal["largest", "smallest", "random"]


class KnownGramians(Protocol):
    """What a reductor knows of a state: a pair of Gramians, measured or those of a known system."""

    system: DiagonalLTI | None
    """The system, or a batch of them, where it is known; the truncation has to keep its state matrix diagonal."""

    is_weighted: bool
    """Whether a known system's Gramians are those of the inputs that it sees, not of white noise."""

    P: torch.Tensor
    Q: torch.Tensor
    decomposition: HankelDecomposition

    R: torch.Tensor | None
    """The readout Gramian, where it was measured."""

    readout_energy: torch.Tensor | None
    """Mean of `h_n^2 C_n^2`, `(..., N)`, where it was measured."""

    def state_scores(self) -> torch.Tensor:
        """The Hankel singular value that each state would have if it were alone, `(..., N)` float64."""
        ...


@dataclass(frozen=True)
class StateChoice:
    """
    How states are chosen, for a reductor that leaves it open.

    Args:
        score (`str`, *optional*, defaults to `"greedy"`): `"greedy"`, `"hankel"` or `"readout_energy"`.
        rule (`str`, *optional*, defaults to `"largest"`): `"largest"`, `"smallest"` or `"random"`.
        seed (`int`, *optional*, defaults to 0): Seed of the rule `"random"`.
    """

    score: SelectionScore = "greedy"
    rule: SelectionRule = "largest"
    seed: int = 0


@dataclass(frozen=True)
class Reductor:
    """
    A way to cut a state, with what it promises.

    Args:
        name (`str`): What a configuration calls it.
        truncate (`Callable`): From Gramians, a rank and a [`StateChoice`] to a [`Truncation`].
        error_bound (`Callable`, *optional*): From Hankel singular values and the rank that a known system is really
            reduced to, to a bound on the H-infinity error; None where no bound is known.
        keeps_states (`bool`): Whether the new states are some of the old ones, which move as before.
        only_selects (`bool`): Whether the dropped states count as zero, so that nothing has to be folded.
        reduces_systems (`bool`): Whether time-invariant systems are reduced with it, and not only selective layers.
    """

    name: str
    truncate: Callable[[KnownGramians, int, StateChoice], Truncation]
    error_bound: Callable[[torch.Tensor, int], float | torch.Tensor] | None
    keeps_states: bool
    only_selects: bool
    reduces_systems: bool


_REDUCTORS: dict[str, Reductor] = {}


def register_reductor(reductor: Reductor) -> Reductor:
    """
    Make a reductor known.

    Raises:
        [`~errors.ConfigurationError`]: its name is taken, or is `"auto"`, which names no reductor.
    """
    if reductor.name in (*_REDUCTORS, "auto"):
        raise ConfigurationError(f"the reductor {reductor.name!r} is already registered; give this one another name.")
    _REDUCTORS[reductor.name] = reductor
    return reductor


def registered_reductors() -> dict[str, Reductor]:
    """The known reductors by name, in alphabetical order."""
    return dict(sorted(_REDUCTORS.items()))


def reductor_names(fits: Callable[[Reductor], bool]) -> frozenset[str]:
    """The names of the reductors that fit."""
    return frozenset(name for name, reductor in _REDUCTORS.items() if fits(reductor))
