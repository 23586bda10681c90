"""Reductors: a system or its Gramians and a rank in, a `Truncation` out. One method and its error bound per file."""

from hf_compressm.systems.reductors.balanced import COARSE_RESOLUTION, balanced_truncation, balancing_truncation
from hf_compressm.systems.reductors.balanced_each import balanced_truncation_of_each, balancing_truncation_of_each
from hf_compressm.systems.reductors.interpolative import interpolation_residual, interpolative_truncation
from hf_compressm.systems.reductors.selection import (
    diagonal_hankel_scores,
    greedy_selection_truncation,
    selection_truncation,
)
from hf_compressm.systems.reductors.weighted import weighted_hankel_decomposition, weighted_truncation

__all__ = [
    "COARSE_RESOLUTION",
    "balanced_truncation",
    "balanced_truncation_of_each",
    "balancing_truncation",
    "balancing_truncation_of_each",
    "diagonal_hankel_scores",
    "greedy_selection_truncation",
    "interpolation_residual",
    "interpolative_truncation",
    "selection_truncation",
    "weighted_hankel_decomposition",
    "weighted_truncation",
]
