"""Cost of one reduction (calibration, spectra, cut, optimizer, loss before and after) in training steps."""

from __future__ import annotations

import copy
import time
from functools import partial

import torch
from common import make_mamba, median_seconds, parser, token_batch, training_step, write_result
from delta_rule_models import make_delta_rule_model
from selective_models import make_model

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

VOCABULARY = 27
CASES = {
    f"Mamba, {layers} layers of width {width}, N = {size}": (
        partial(make_mamba, size, hidden_size=width, layers=layers, vocabulary=VOCABULARY),
        (batch, length),
    )
    for layers, width, batch, length, sizes in ((2, 32, 64, 64, (16, 64, 128)), (4, 256, 8, 512, (16, 64)))
    for size in sizes
}
CASES |= {
    f"{name}, 2 layers of width 128, N = {size}": (partial(make_model, family, VOCABULARY, size, width=128), (16, 256))
    for family, name in (("mamba2", "Mamba2"), ("falcon_mamba", "FalconMamba"), ("jamba", "Jamba"), ("bamba", "Bamba"))
    for size in (64, 128)
}
CASES |= {
    f"{name}, 2 layers of width 64, N = 64": (partial(make_delta_rule_model, family, VOCABULARY, 64), (16, 256))
    for family, name in {
        "gated_delta_net": "gated DeltaNet",
        "kimi_delta": "Kimi delta attention",
        "minimax": "lightning attention",
        "xlstm": "xLSTM",
    }.items()
}


def main() -> None:
    """Time a reduction beside a training step of the same model on a batch of the same size."""
    options = parser(__doc__).parse_args()
    figures, rows = {}, []
    for name, (build, shape) in CASES.items():
        torch.manual_seed(0)
        model, batch = build(), token_batch(*shape, VOCABULARY)
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
        shown = f"{shape[0]} x {shape[1]}"
        rows.append([name, shown, f"{step_seconds * 1e3:.1f} ms", f"{cost * 1e3:.1f} ms", f"{cost / step_seconds:.2f}"])
    write_result(
        "reduction_cost",
        "Cost of one reduction",
        ["model", "batch", "training step", "reduction", "reduction in steps"],
        rows,
        figures,
        "One calibration batch of the training batch's size; N to N/4, in each family's default form (Jamba and Bamba "
        "with an attention layer between the two); medians of interleaved repetitions.",
    )


if __name__ == "__main__":
    main()
