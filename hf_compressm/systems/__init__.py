"""Control theory on tensors: linear systems, Gramians, Hankel singular values, and the reductors built on them.

Nothing here knows of neural networks: only PyTorch and the errors of this library are imported.
"""

from hf_compressm.systems.gramians import (
    controllability_factor,
    controllability_gramian,
    gramian_factor,
    lyapunov_residual,
    observability_factor,
    observability_gramian,
)
from hf_compressm.systems.hankel import HankelDecomposition, hankel_decomposition, hankel_singular_values
from hf_compressm.systems.lti import DiagonalLTI
from hf_compressm.systems.projection import project
from hf_compressm.systems.ranks import energy_rank, error_bound, joint_energy_ranks, rank_correlation
from hf_compressm.systems.reductors import (
    COARSE_RESOLUTION,
    balanced_truncation,
    balanced_truncation_of_each,
    balancing_truncation,
    balancing_truncation_of_each,
    diagonal_hankel_scores,
    greedy_selection_truncation,
    interpolation_residual,
    interpolative_truncation,
    selection_truncation,
    weighted_hankel_decomposition,
    weighted_truncation,
)
from hf_compressm.systems.time_domain import TimeDomain
from hf_compressm.systems.truncation import Truncation
from hf_compressm.systems.verification import require_error_bound, response_error, verification_frequencies

__all__ = [
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
    "error_bound",
    "gramian_factor",
    "greedy_selection_truncation",
    "hankel_decomposition",
    "hankel_singular_values",
    "interpolation_residual",
    "interpolative_truncation",
    "joint_energy_ranks",
    "lyapunov_residual",
    "observability_factor",
    "observability_gramian",
    "project",
    "rank_correlation",
    "require_error_bound",
    "response_error",
    "selection_truncation",
    "verification_frequencies",
    "weighted_hankel_decomposition",
    "weighted_truncation",
]
