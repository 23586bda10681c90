"""Fast recurrences, each with its slow reference beside it."""

from .selective_gramians import adjoint_gramian, default_sample_count, sample_times, state_gramian
from .selective_scan import selective_scan, selective_scan_reference
from .warm_up import compile_kernels

__all__ = [
    "adjoint_gramian",
    "compile_kernels",
    "default_sample_count",
    "sample_times",
    "selective_scan",
    "selective_scan_reference",
    "state_gramian",
]
