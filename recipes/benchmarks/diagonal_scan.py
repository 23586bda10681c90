"""
The recurrence of an LRU layer on the CPU, forward and backward, by four methods, over lengths and state sizes.

`loop` is the reference that autograd goes through step by step; `products` scans with products of powers of the poles,
in plain torch; `convolution` multiplies the Fourier transforms of the input and of the H x H impulse responses;
`diagonal_recurrence` is the fused one that the models use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from common import median_seconds, parser, write_result

from hf_compressm.ops import diagonal_recurrence, diagonal_recurrence_reference
from hf_compressm.ops._diagonal_scan_torch import scan_by_products

# (batch, length) of 4,096 steps in all but the longest; every one with each N and each H.
LENGTHS = ((64, 64), (16, 256), (4, 1024), (1, 4096), (1, 16384))
STATE_SIZES = (8, 64, 512)
WIDTHS = (8, 64)
# The loop keeps every state, and the impulse responses have H x H x length entries: skipped where they would not fit.
_LONGEST_LOOP = 256
_LARGEST_KERNEL = 2**25


def arguments(batch: int, length: int, n: int, width: int) -> list[torch.Tensor]:
    """u, lam, B and C that require a gradient, with poles as an LRU starts with."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.complex64)  # noqa: E731
    radius, phase = torch.rand(2, n, generator=generator)
    lam = torch.polar(0.9 + 0.099 * radius, 6.2832 * phase)
    tensors = [normal(batch, length, width).real.contiguous(), lam, normal(n, width) / n, normal(width, n)]
    return [tensor.requires_grad_() for tensor in tensors]


def by_products(u: torch.Tensor, lam: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence by products of powers."""
    states = scan_by_products(lam, u.to(lam.dtype) @ B.mT, lam.new_zeros(u.shape[0], lam.shape[0]))
    return (states @ C.mT).real


def by_convolution(u: torch.Tensor, lam: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence as a convolution with its impulse responses."""
    length = u.shape[1]
    powers = lam.unsqueeze(-1) ** torch.arange(length)
    kernel = torch.einsum("on,nl,ni->loi", C, powers, B).real
    spectrum = torch.einsum(
        "loi,bli->blo", torch.fft.rfft(kernel, 2 * length, dim=0), torch.fft.rfft(u, 2 * length, dim=1)
    )
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]


METHODS = {
    "loop": lambda *tensors: diagonal_recurrence_reference(*tensors)[0],
    "products": by_products,
    "convolution": by_convolution,
    "diagonal_recurrence": lambda *tensors: diagonal_recurrence(*tensors)[0],
}


def applies(name: str, length: int, width: int) -> bool:
    """Whether a method's memory fits."""
    if name == "loop":
        return length <= _LONGEST_LOOP
    return name != "convolution" or width * width * length <= _LARGEST_KERNEL


def step(method: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        torch.autograd.grad(method(*tensors).sum(), tensors)

    return run


def main() -> None:
    """Time all methods at each shape."""
    made = parser(__doc__)
    made.set_defaults(repeats=3)
    options = made.parse_args()
    figures, rows = [], []
    for (batch, length), n, width in itertools.product(LENGTHS, STATE_SIZES, WIDTHS):
        tensors = arguments(batch, length, n, width)
        names = [name for name in METHODS if applies(name, length, width)]
        seconds = dict(zip(names, median_seconds([step(METHODS[name], tensors) for name in names], options.repeats)))
        outputs = {name: METHODS[name](*tensors).detach() for name in names}
        ours = outputs["diagonal_recurrence"]
        difference = max(((output - ours).abs().max() / ours.abs().max()).item() for output in outputs.values())
        figures.append({"batch": batch, "length": length, "N": n, "H": width, **seconds, "difference": difference})
        times = [f"{seconds[name] * 1e3:.1f} ms" if name in seconds else "-" for name in METHODS]
        rows.append([f"{batch} x {length}", f"{n}", f"{width}", *times, f"{difference:.0e}"])
    write_result(
        "diagonal_scan",
        "Recurrence of an LRU layer on a CPU, forward and backward",
        ["batch x time", "N", "H", *METHODS, "outputs differ by"],
        rows,
        figures,
        "Medians of interleaved repetitions; a dash where a method's memory would not fit. The last column is the "
        "largest difference of an output from ours, relative to the largest output.",
    )


if __name__ == "__main__":
    main()
