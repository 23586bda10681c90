"""
The systems of an S4D layer on the CPU, forward and backward, as a recurrence and as a convolution, over sizes.

`recurrence` scans all channels' states and reads them out; `convolution` multiplies Fourier transforms of input and
impulse responses, which is what the models use where no state is carried over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from common import median_seconds, parser, write_result

from hf_compressm.ops import channel_systems, diagonal_scan

# (batch, length) of 4,096 steps in all but the longest; every one with each N.
LENGTHS = ((64, 64), (16, 256), (4, 1024), (1, 4096), (1, 16384))
STATE_SIZES = (8, 64, 512)
CHANNELS = 8


def arguments(batch: int, length: int, n: int) -> list[torch.Tensor]:
    """u, lam and C that require a gradient, with poles of many time scales."""
    generator = torch.Generator().manual_seed(0)
    rate, phase = torch.rand(2, CHANNELS, n, generator=generator)
    lam = torch.polar(torch.exp(-torch.exp(6 * rate - 7)), 3.1416 * phase)
    C = torch.randn(CHANNELS, n, generator=generator, dtype=torch.complex64) / n
    u = torch.randn(batch, length, CHANNELS, generator=generator)
    return [tensor.requires_grad_() for tensor in (u, lam, C)]


def by_recurrence(u: torch.Tensor, lam: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """All states one after the other, then the readout."""
    drive = u.unsqueeze(-1).to(lam.dtype).expand(*u.shape, lam.shape[1]).flatten(2)
    states = diagonal_scan(lam.flatten(), drive, lam.new_zeros(u.shape[0], lam.numel()))
    return (states.unflatten(2, lam.shape) * C).sum(-1).real


def by_convolution(u: torch.Tensor, lam: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """What the models use."""
    return channel_systems(u, lam, C, return_state=False)[0]


METHODS = {"recurrence": by_recurrence, "convolution": by_convolution}


def step(method: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        torch.autograd.grad(method(*tensors).sum(), tensors)

    return run


def main() -> None:
    """Time both methods at each shape."""
    made = parser(__doc__)
    made.set_defaults(repeats=3)
    options = made.parse_args()
    figures, rows = [], []
    for (batch, length), n in itertools.product(LENGTHS, STATE_SIZES):
        tensors = arguments(batch, length, n)
        seconds = median_seconds([step(method, tensors) for method in METHODS.values()], options.repeats)
        recurrence, convolution = (method(*tensors).detach() for method in METHODS.values())
        difference = ((recurrence - convolution).abs().max() / recurrence.abs().max()).item()
        figures.append(
            {"batch": batch, "length": length, "N": n, **dict(zip(METHODS, seconds)), "difference": difference}
        )
        times = [f"{time * 1e3:.1f} ms" for time in seconds]
        rows.append([f"{batch} x {length}", f"{n}", *times, f"{seconds[0] / seconds[1]:.1f}x", f"{difference:.0e}"])
    write_result(
        "channel_systems",
        f"The systems of an S4D layer of {CHANNELS} channels on a CPU, forward and backward",
        ["batch x time", "N", *METHODS, "convolution is faster by", "outputs differ by"],
        rows,
        figures,
        "Medians of interleaved repetitions. N is the number of complex states of a channel. The last column is the "
        "largest difference of the outputs relative to the largest output.",
    )


if __name__ == "__main__":
    main()
