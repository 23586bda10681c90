"""
The figures of docs/method.md, from a small linear system of the kind that an LRU layer holds.

    python recipes/figures.py [--output-dir docs/figures] [--states 32] [--steps 10000] [--seed 0]

Takes seconds. `hankel_singular_values.png`: in closed form, and from Gramians that are measured on sequences of two
lengths and on one whose inputs are smooth. `error_against_size.png`: the largest error over all frequencies of balanced
truncation, of the selection of states, and the bound of Glover, 1984.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hf_compressm.systems import (
    DiagonalLTI,
    balanced_truncation,
    error_bound,
    hankel_singular_values,
    response_error,
    verification_frequencies,
)


def lru_system(states: int, seed: int, width: int = 2) -> DiagonalLTI:
    """A system with the poles that an LRU starts from: a ring in the unit disk, equally dense in its area."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = 0.6, 0.98
    share, turn = torch.rand(2, states, generator=generator, dtype=torch.float64)
    radius = (share * (outer**2 - inner**2) + inner**2).sqrt()
    B, C = torch.randn(2, 2, states, width, generator=generator, dtype=torch.float64)
    gain = (1 - radius**2).sqrt()[:, None]
    return DiagonalLTI(torch.polar(radius, 2 * math.pi * turn), gain * torch.complex(*B), torch.complex(*C).mT)


def measured_gramian(lam: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The mean of `h h^H` over the states that inputs `(steps, N)` drive."""
    state, total = torch.zeros_like(lam), torch.zeros(len(lam), len(lam), dtype=lam.dtype)
    for step in inputs:
        state = lam * state + step
        total += state[:, None] * state.conj()
    return total / len(inputs)


def measured_singular_values(system: DiagonalLTI, steps: int, smoothness: float, seed: int) -> torch.Tensor:
    """Hankel singular values of Gramians that are both measured: along the states, and along the adjoint states."""
    generator = torch.Generator().manual_seed(seed)
    width = system.B.shape[-1]
    u, v = torch.randn(2, steps, width, generator=generator, dtype=torch.float64).to(torch.complex128)
    for step in range(1, steps):
        # An input of unit variance that remembers its past.
        u[step] = smoothness * u[step - 1] + math.sqrt(1 - smoothness**2) * u[step]
    P = measured_gramian(system.lam, u @ system.B.mT)
    Q = measured_gramian(system.lam.conj(), v @ system.C.conj())
    return hankel_singular_values(P, Q)


def draw_singular_values(system: DiagonalLTI, steps: int, seed: int, path: Path) -> None:
    """Hankel singular values in closed form, and from data."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    places = range(1, system.order + 1)
    axes.plot(places, system.hankel_singular_values(), "k-", label="closed form")
    short = max(steps // 100, 2)
    for length, smoothness, label in (
        (short, 0.0, f"white noise, {short:,} steps"),
        (steps, 0.0, f"white noise, {steps:,} steps"),
        (steps, 0.95, f"smooth inputs, {steps:,} steps"),
    ):
        axes.plot(places, measured_singular_values(system, length, smoothness, seed), ".", label=label)
    axes.set(yscale="log", xlabel="direction of the state", ylabel="Hankel singular value")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def errors_of_sizes(system: DiagonalLTI) -> dict[str, list[float]]:
    """The largest error over all frequencies at every size below the full one, and the bound, by the way to cut."""
    sigma, omega = system.hankel_singular_values(), verification_frequencies(system)
    scores = system.controllability_gramian().diagonal().real * system.observability_gramian().diagonal().real
    order = scores.argsort(descending=True)
    found: dict[str, list[float]] = {"bound": [], "balanced truncation": [], "selection of states": []}
    for size in range(1, system.order):
        kept = order[:size]
        selected = DiagonalLTI(system.lam[kept], system.B[kept], system.C[:, kept])
        found["bound"].append(float(error_bound(sigma, size)))
        found["balanced truncation"].append(
            float(response_error(system, balanced_truncation(system, size)[0], omega).max())
        )
        found["selection of states"].append(float(response_error(system, selected, omega).max()))
    return found


def draw_errors(system: DiagonalLTI, path: Path) -> None:
    """The error against the state size."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    styles = {"bound": "k--", "balanced truncation": "C0.-", "selection of states": "C1.-"}
    for name, errors in errors_of_sizes(system).items():
        axes.plot(range(1, system.order), errors, styles[name], label=name)
    axes.set(yscale="log", xlabel="states kept", ylabel="largest error over all frequencies")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    system = lru_system(options.states, options.seed)
    draw_singular_values(system, options.steps, options.seed, options.output_dir / "hankel_singular_values.png")
    draw_errors(system, options.output_dir / "error_against_size.png")


if __name__ == "__main__":
    main()
