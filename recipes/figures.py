"""
The figures of docs/method.md: one small system, cut in three ways under two kinds of input.

    python recipes/figures.py [--states 64] [--output docs/figures]

The system is a linear recurrent unit with the published initial poles and random input and output matrices. Its input
is white noise, as the closed form of the Gramians assumes, or what a layer in a model rather sees: a few slow signals
mixed into all channels, with a little noise.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

from hf_compressm.ops import diagonal_recurrence, diagonal_state_gramian, sampled_diagonal_states
from hf_compressm.systems import (
    DiagonalLTI,
    OutputMoments,
    Truncation,
    balanced_truncation,
    fit_system_readout,
    project,
    weighted_hankel_decomposition,
    weighted_truncation,
)

CHANNELS, SEQUENCES, LENGTH, WARM_UP = 8, 12, 600, 100


def random_system(states: int, generator: torch.Generator) -> DiagonalLTI:
    """Poles on a ring from 0.9 to 0.999, as an LRU begins with them, and gains that give all states the same power."""
    radius = (torch.rand(states, generator=generator, dtype=torch.float64) * (0.999**2 - 0.9**2) + 0.9**2).sqrt()
    angle = math.pi / 10 * torch.rand(states, generator=generator, dtype=torch.float64)
    B = torch.randn(states, CHANNELS, generator=generator, dtype=torch.complex128)
    C = torch.randn(CHANNELS, states, generator=generator, dtype=torch.complex128)
    return DiagonalLTI(torch.polar(radius, angle), B * (1 - radius**2).sqrt().unsqueeze(-1), C / math.sqrt(states))


def white_input(generator: torch.Generator) -> Tensor:
    """Independent from step to step and from channel to channel; (sequences, time, channels)."""
    return torch.randn(SEQUENCES, LENGTH, CHANNELS, generator=generator, dtype=torch.float64)


def slow_input(generator: torch.Generator) -> Tensor:
    """Three slow signals mixed into all channels, and one part in twenty of noise."""
    noise = torch.randn(SEQUENCES, LENGTH, 3, generator=generator, dtype=torch.float64)
    pole = torch.tensor([0.98, 0.95, 0.9], dtype=torch.complex128)
    eye = torch.eye(3, dtype=torch.complex128)
    signals = diagonal_recurrence(noise, pole, eye * (1 - pole.abs() ** 2).sqrt(), eye)[0]
    # The same in every draw, as a layer's input always comes through the same weights.
    mixing = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return signals @ mixing + 0.05 * white_input(generator)


def outputs(system: DiagonalLTI, u: Tensor) -> Tensor:
    """The real outputs after the first steps, in which the states fill."""
    return diagonal_recurrence(u, system.lam, system.B, system.C)[0][:, WARM_UP:]


def relative_error(system: DiagonalLTI, reduced: DiagonalLTI, u: Tensor) -> float:
    """The part of the output that the reduced system misses."""
    y = outputs(system, u)
    return float((outputs(reduced, u) - y).norm() / y.norm())


def with_fitted_readout(system: DiagonalLTI, reduced: DiagonalLTI, u: Tensor) -> DiagonalLTI:
    """The reduced system with the readout that comes nearest to the outputs on an input."""
    times = torch.arange(WARM_UP, LENGTH).expand(len(u), -1)
    states, y = sampled_diagonal_states(u, reduced.lam, reduced.B, times), outputs(system, u)
    held_out = len(u) // 4
    parts = [
        OutputMoments.of(states[rows].flatten(0, 1), y[rows].flatten(0, 1))
        for rows in (slice(held_out, None), slice(held_out))
    ]
    return DiagonalLTI(reduced.lam, reduced.B, fit_system_readout(reduced.C, *parts))


def cuts(system: DiagonalLTI, r: int, u: Tensor) -> dict[str, DiagonalLTI]:
    """The reduced systems of one size, by what they are made from."""
    P = diagonal_state_gramian(u, system.lam, system.B)
    weighted: Truncation = weighted_truncation(system, r, P)
    from_data = project(system, weighted)
    return {
        "closed form": balanced_truncation(system, r)[0],
        "P from data": from_data,
        "P from data, readout fitted": with_fitted_readout(system, from_data, u),
    }


def draw(states: int, folder: Path) -> None:
    """Draw both figures."""
    generator = torch.Generator().manual_seed(0)
    system = random_system(states, generator)
    inputs = {"white noise": white_input, "slow input": slow_input}
    seen = {name: make(generator) for name, make in inputs.items()}
    unseen = {name: make(generator) for name, make in inputs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _draw_spectra(system, seen["slow input"], folder / "spectra.png")
    sizes = sorted({max(1, round(states * share)) for share in (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, inputs):
        errors: dict[str, list[float]] = {}
        for r in sizes:
            for label, reduced in cuts(system, r, seen[name]).items():
                errors.setdefault(label, []).append(relative_error(system, reduced, unseen[name]))
        for label, values in errors.items():
            axis.plot(sizes, values, "o-", label=label)
        axis.set(title=name, xlabel="states kept", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the output")
    axes[1].legend()
    figure.savefig(folder / "output_errors.png", dpi=130)
    pyplot.close(figure)


def _draw_spectra(system: DiagonalLTI, u: Tensor, path: Path) -> None:
    spectra = {
        "closed form (white noise)": system.hankel_singular_values(),
        "P from data (slow input)": weighted_hankel_decomposition(
            system, diagonal_state_gramian(u, system.lam, system.B) / (u.shape[0] * u.shape[1])
        ).sigma,
    }
    figure, axis = pyplot.subplots(figsize=(5.2, 3.4), layout="constrained")
    for label, sigma in spectra.items():
        axis.plot(range(1, len(sigma) + 1), sigma / sigma[0], ".-", label=label)
    axis.set(xlabel="direction", ylabel="Hankel singular value, largest = 1", yscale="log", ylim=(1e-8, 2))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    options = parser.parse_args(arguments)
    draw(options.states, options.output)


if __name__ == "__main__":
    main()
