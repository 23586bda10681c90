"""Stable systems for hypothesis to search for counterexamples."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_compressm.systems import DiagonalLTI

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def systems(draw: st.DrawFn, max_order: int = 8, decades: float = 8.0) -> DiagonalLTI:
    """Ill-conditioned on purpose: poles 1e-6 from the boundary or equal to each other, rows 16 decades apart, zeros."""
    order, inputs, outputs = draw(st.integers(1, max_order)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    poles = []
    for _ in range(order):
        if poles and draw(st.integers(0, 4)) == 0:
            poles.append(draw(st.sampled_from(poles)) * draw(st.sampled_from([1.0, 1 - 1e-12, 1 - 1e-5])))
        else:
            margin = 10 ** draw(st.floats(-6, -0.01))
            poles.append((1 - margin) * np.exp(1j * draw(st.sampled_from([0.0, np.pi, 1e-3, 1.0, -2.5]))))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = generator.normal(size=(rows, columns)) + 1j * generator.normal(size=(rows, columns))
        size = 10 ** generator.uniform(-decades, decades, (rows, 1)) if draw(st.booleans()) else 1.0
        values = values * size
        values[generator.uniform(size=rows) < draw(st.sampled_from([0.0, 0.0, 0.3]))] = 0
        return values[:, :1] * np.ones((1, columns)) if draw(st.integers(0, 4)) == 0 else values

    lam = np.array(poles)
    time_domain = draw(st.sampled_from(["discrete", "continuous"]))
    if time_domain == "continuous":
        lam = (lam - 1) / (lam + 1)
    tensors = (torch.from_numpy(x.copy()) for x in (lam, matrix(order, inputs), matrix(order, outputs).T))
    return DiagonalLTI(*tensors, time_domain=time_domain)
