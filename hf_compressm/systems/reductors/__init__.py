"""Reductors: a system or its Gramians and a rank in, a `Truncation` out. One method and its error bound per file."""

from importlib import import_module
from pkgutil import iter_modules

from .balanced import COARSE_RESOLUTION, balanced_truncation, balancing_truncation
from .balanced_each import balanced_truncation_of_each, balancing_truncation_of_each
from .interpolative import interpolation_residual, interpolative_truncation
from .oblique import erased_shares, oblique_truncation
from .orthonormal import orthonormal_truncation
from .readout import fit_readout, fit_readouts
from .reductor import (
    KnownGramians,
    Reductor,
    StateChoice,
    reductor_names,
    register_reductor,
    registered_reductors,
)
from .selection import (
    diagonal_hankel_scores,
    greedy_selection_truncation,
    selection_truncation,
)
from .system_readout import fit_system_readout
from .weighted import weighted_hankel_decomposition, weighted_truncation

# A file added to this folder is a reductor added to the library.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "KnownGramians",
    "Reductor",
    "StateChoice",
    "reductor_names",
    "register_reductor",
    "registered_reductors",
    "COARSE_RESOLUTION",
    "balanced_truncation",
    "balanced_truncation_of_each",
    "balancing_truncation",
    "balancing_truncation_of_each",
    "diagonal_hankel_scores",
    "fit_readout",
    "fit_readouts",
    "fit_system_readout",
    "greedy_selection_truncation",
    "interpolation_residual",
    "erased_shares",
    "interpolative_truncation",
    "oblique_truncation",
    "orthonormal_truncation",
    "selection_truncation",
    "weighted_hankel_decomposition",
    "weighted_truncation",
]
