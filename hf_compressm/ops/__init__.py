"""Fast recurrences, each with its slow reference beside it."""

from .selective_gramians import adjoint_gramian, default_sample_count, sample_times, state_gramian
from .selective_scan import selective_scan, selective_scan_reference

__all__ = [
    "adjoint_gramian",
    "default_sample_count",
    "sample_times",
    "selective_scan",
    "selective_scan_reference",
    "state_gramian",
]
