"""Compile the CPU kernels before they are needed."""

from __future__ import annotations

import torch

from .causal_convolution import causal_convolution
from .delta_rule import delta_rule
from .diagonal_scan import diagonal_recurrence
from .sampled_states import sampled_states
from .selective_gramians import adjoint_gramian, state_gramian
from .selective_scan import selective_scan

# Of the filters that all families have by default; each other number of taps has kernels of its own.
_TAPS = 4


def compile_kernels() -> None:
    """
    Compile the float32 CPU kernels of the scans and of their Gramians, or load them where they were compiled before.

    The first use of a kernel on a machine takes seconds; calling this at the start of a run keeps them out of the
    run's first steps and out of its first reduction.
    """
    u, B = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    A = torch.full((1, 1), -1.0)
    with torch.enable_grad():
        y, _ = selective_scan(u.clone().requires_grad_(), u, A, B, B)
        y.sum().backward()
        causal_convolution(u.clone().requires_grad_(), torch.zeros(1, _TAPS), silu=True).sum().backward()
        lam, B_lti = torch.full((1,), 0.5, dtype=torch.complex64), torch.ones(1, 1, dtype=torch.complex64)
        y, _ = diagonal_recurrence(u.clone().requires_grad_(), lam, B_lti, B_lti)
        y.sum().backward()
        k, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
        y, _ = delta_rule(k.clone().requires_grad_(), k, k, v, v)
        y.sum().backward()
    state_gramian(u, u, A, B, B)
    adjoint_gramian(u, A, B, u)
    sampled_states(u, u, A, B, torch.zeros(1, 1, dtype=torch.int64))
