"""Training step of a Mamba on the CPU as its state shrinks."""

from __future__ import annotations

from common import make_mamba, median_seconds, parser, token_batch, training_step, write_result

from hf_compressm import fast_cpu_scan

STATE_SIZES = (128, 64, 16, 12, 8)
MODELS = {
    "2 layers of width 32, batch 64 x 64": ({"hidden_size": 32, "layers": 2}, (64, 64)),
    "4 layers of width 256, batch 8 x 512": ({"hidden_size": 256, "layers": 4}, (8, 512)),
}


def main() -> None:
    """Time a step at each state size."""
    options = parser(__doc__).parse_args()
    figures, rows = {}, []
    for name, (sizes, shape) in MODELS.items():
        batch = token_batch(*shape)
        steps = [training_step(make_mamba(state_size, **sizes), batch) for state_size in STATE_SIZES]
        with fast_cpu_scan():
            seconds = median_seconds(steps, options.repeats, warm_up=2)
        figures[name] = dict(zip(map(str, STATE_SIZES), seconds))
        rows.append([name, *(f"{time * 1e3:.1f} ms ({seconds[0] / time:.1f}x)" for time in seconds)])
    write_result(
        "step_time",
        "Training step on a CPU by state size N (speed against N = 128)",
        ["model", *(f"N = {n}" for n in STATE_SIZES)],
        rows,
        figures,
        "Forward, backward and AdamW with the fused CPU scan; medians of interleaved repetitions.",
    )


if __name__ == "__main__":
    main()
