"""
Training step of a Mamba on the CPU with three scans: transformers' loop over time, mambapy's parallel scan, ours.

The model has two layers of 64 channels and reads 64 sequences of 64 tokens. mambapy is what transformers itself runs
with `use_mambapy=True`; our scan is put in with `fast_cpu_scan`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import make_mamba, median_seconds, parser, token_batch, training_step, write_result

from hf_compressm import fast_cpu_scan

STATE_SIZES = (128, 64, 16, 8)
SHAPE = (64, 64)
SCANS = ("transformers", "mambapy", "hf_compressm")


def with_fast_scan(function: Callable[[], None]) -> Callable[[], None]:
    """The function inside of the switch."""

    def switched() -> None:
        with fast_cpu_scan():
            function()

    return switched


def training_steps(state_size: int, batch: dict[str, torch.Tensor]) -> list[Callable[[], None]]:
    """One training step with each of the scans, on models of their own with equal weights."""
    stock = training_step(make_mamba(state_size), batch)
    mambapy = training_step(make_mamba(state_size, use_mambapy=True), batch)
    ours = with_fast_scan(training_step(make_mamba(state_size), batch))
    return [stock, mambapy, ours]


def gradient_difference(state_size: int, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient between the stock scan and ours, relative to its parameter's largest."""
    gradients = []
    for fast in (False, True):
        model = make_mamba(state_size).train()
        with fast_cpu_scan(enabled=fast):
            model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients))


def main() -> None:
    """Time all scans at each state size, and compare their gradients."""
    options = parser(__doc__).parse_args()
    batch = token_batch(*SHAPE)
    figures, rows = {}, []
    for state_size in STATE_SIZES:
        seconds = median_seconds(training_steps(state_size, batch), options.repeats, warm_up=2)
        difference = gradient_difference(state_size, batch)
        figures[str(state_size)] = {**dict(zip(SCANS, seconds)), "gradient_difference": difference}
        stock, mambapy, ours = seconds
        rows.append(
            [
                str(state_size),
                f"{stock * 1e3:.0f} ms",
                f"{mambapy * 1e3:.0f} ms",
                f"{ours * 1e3:.1f} ms",
                f"{stock / ours:.0f}x",
                f"{mambapy / ours:.0f}x",
                f"{difference:.0e}",
            ]
        )
    write_result(
        "cpu_scan",
        "Training step of a 2-layer Mamba on a CPU, by scan",
        ["N", *SCANS, "against transformers", "against mambapy", "gradients differ by"],
        rows,
        figures,
        "Forward, backward and fused AdamW; 64 channels, batch 64 x 64; medians of interleaved repetitions. The last "
        "column is the largest difference of a gradient from transformers' scan, relative to its parameter's largest.",
    )


if __name__ == "__main__":
    main()
