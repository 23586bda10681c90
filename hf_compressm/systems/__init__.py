"""Control theory on tensors: linear systems, Gramians, Hankel singular values, and the reductors built on them.

Nothing here knows of neural networks: only PyTorch and the errors of this library are imported.
"""

from .descent import MOST_ENTRIES, descend, inverse_root
from .gramians import (
    controllability_factor,
    controllability_gramian,
    gramian_factor,
    lyapunov_residual,
    observability_factor,
    observability_gramian,
)
from .hankel import HankelDecomposition, hankel_decomposition, hankel_singular_values
from .lti import DiagonalLTI
from .output_moments import OutputMoments
from .output_samples import OutputSamples
from .projection import project
from .ranks import energy_rank, error_bound, joint_energy_ranks, rank_correlation
from .reductors import (
    COARSE_RESOLUTION,
    KnownGramians,
    Reductor,
    StateChoice,
    balanced_truncation,
    balanced_truncation_of_each,
    balancing_truncation,
    balancing_truncation_of_each,
    diagonal_hankel_scores,
    erased_shares,
    fit_readout,
    fit_readouts,
    fit_system_readout,
    greedy_selection_truncation,
    interpolation_residual,
    interpolative_truncation,
    oblique_truncation,
    orthonormal_truncation,
    reductor_names,
    register_reductor,
    registered_reductors,
    selection_truncation,
    weighted_hankel_decomposition,
    weighted_truncation,
)
from .regression import reconstruction
from .time_domain import TimeDomain
from .truncation import Truncation
from .verification import require_error_bound, response_error, verification_frequencies

__all__ = [
    "MOST_ENTRIES",
    "descend",
    "inverse_root",
    "KnownGramians",
    "OutputMoments",
    "OutputSamples",
    "Reductor",
    "StateChoice",
    "reductor_names",
    "register_reductor",
    "registered_reductors",
    "COARSE_RESOLUTION",
    "DiagonalLTI",
    "HankelDecomposition",
    "TimeDomain",
    "Truncation",
    "balanced_truncation",
    "balanced_truncation_of_each",
    "balancing_truncation",
    "balancing_truncation_of_each",
    "controllability_factor",
    "controllability_gramian",
    "diagonal_hankel_scores",
    "energy_rank",
    "erased_shares",
    "fit_readout",
    "fit_readouts",
    "fit_system_readout",
    "error_bound",
    "gramian_factor",
    "greedy_selection_truncation",
    "hankel_decomposition",
    "hankel_singular_values",
    "interpolation_residual",
    "interpolative_truncation",
    "joint_energy_ranks",
    "lyapunov_residual",
    "oblique_truncation",
    "orthonormal_truncation",
    "observability_factor",
    "observability_gramian",
    "project",
    "rank_correlation",
    "reconstruction",
    "require_error_bound",
    "response_error",
    "selection_truncation",
    "verification_frequencies",
    "weighted_hankel_decomposition",
    "weighted_truncation",
]
