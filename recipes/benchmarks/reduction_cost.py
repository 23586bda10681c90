"""Cost of one reduction (calibration, spectra, cut, optimizer, loss before and after) in training steps."""

from __future__ import annotations

import copy
import time

import torch
from common import make_mamba, median_seconds, parser, token_batch, training_step, write_result

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

CASES = {
    "2 layers of width 32, N = 16, batch 64 x 64": (16, {"hidden_size": 32, "layers": 2}, (64, 64)),
    "2 layers of width 32, N = 64, batch 64 x 64": (64, {"hidden_size": 32, "layers": 2}, (64, 64)),
    "2 layers of width 32, N = 128, batch 64 x 64": (128, {"hidden_size": 32, "layers": 2}, (64, 64)),
    "4 layers of width 256, N = 16, batch 8 x 512": (16, {"hidden_size": 256, "layers": 4}, (8, 512)),
    "4 layers of width 256, N = 64, batch 8 x 512": (64, {"hidden_size": 256, "layers": 4}, (8, 512)),
}


def main() -> None:
    """Time a reduction beside a training step of the same model on a batch of the same size."""
    options = parser(__doc__).parse_args()
    figures, rows = {}, []
    for name, (state_size, sizes, shape) in CASES.items():
        model, batch = make_mamba(state_size, **sizes), token_batch(*shape)
        step = training_step(model, batch)
        durations: list[float] = []

        def reduction(model=model, batch=batch, durations=durations) -> None:
            # The copy is not part of the reduction; it lets the same full model be cut again.
            victim = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(victim.parameters(), lr=1e-4)
            optimizer.zero_grad()
            start = time.perf_counter()
            record = compress(victim, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=0.25), optimizer)
            durations.append(time.perf_counter() - start)
            assert record.outcome == "cut"

        with fast_cpu_scan():
            step_seconds, _ = median_seconds([step, reduction], options.repeats, warm_up=2)
        cost = sorted(durations[2:])[len(durations[2:]) // 2]
        figures[name] = {"step": step_seconds, "reduction": cost}
        rows.append([name, f"{step_seconds * 1e3:.1f} ms", f"{cost * 1e3:.1f} ms", f"{cost / step_seconds:.2f}"])
    write_result(
        "reduction_cost",
        "Cost of one reduction",
        ["model", "training step", "reduction", "reduction in steps"],
        rows,
        figures,
        "One calibration batch of the training batch's size; N to N/4; medians of interleaved repetitions.",
    )


if __name__ == "__main__":
    main()
