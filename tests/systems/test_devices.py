"""Results stay on the device of the arguments, whatever the default device is.

No accelerator is needed: with the default device set to "meta", a tensor that the library creates without naming a
device has no values and does not mix with the arguments, which are on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from hf_compressm.systems import (
    DiagonalLTI,
    Truncation,
    balanced_truncation,
    balancing_truncation,
    diagonal_hankel_scores,
    energy_rank,
    error_bound,
    hankel_decomposition,
    hankel_singular_values,
    interpolation_residual,
    interpolative_truncation,
    lyapunov_residual,
    project,
    rank_correlation,
    selection_truncation,
)

from .oracles import random_system


@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
def test_nothing_is_created_on_the_default_device(time_domain: str) -> None:
    system = random_system("mimo", 0, time_domain, batch=(2,))
    single = DiagonalLTI(system.lam[0], system.B[0], system.C[0], system.D[0], time_domain)
    u, omega = torch.randn(5, 2), torch.linspace(-1, 1, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        P, Q = system.controllability_gramian(), system.observability_gramian()
        sigma = hankel_singular_values(P, Q)
        scores = diagonal_hankel_scores(P, Q)
        interpolated = interpolative_truncation(P[0], Q[0], 4)
        selected = selection_truncation(scores, 4)
        reduced, balanced = balanced_truncation(system, 5)
        full, everything = balanced_truncation(system, 12)
        results = [
            *(P, Q, sigma, scores, system.hankel_singular_values(), system.frequency_response(omega)),
            lyapunov_residual(P, system.lam, system.B, time_domain),
            *(interpolated.T, interpolated.indices, selected.T, selected.indices, everything.T, full.lam),
            *(reduced.lam, balanced.T, balancing_truncation(hankel_decomposition(P, Q), 3).W),
            selection_truncation(scores, 3, "random", generator).T,
            project(single, interpolated).C,
            *(error_bound(sigma, 3), energy_rank(sigma, 0.1), rank_correlation(scores, sigma)),
            interpolation_residual(P, Q, selected),
            Truncation.from_indices(selected.indices, 12).T,
        ]
        if time_domain == "discrete":
            results += [system.simulate(u), system.impulse_response(4)]
    assert {tensor.device.type for tensor in results} == {"cpu"}
