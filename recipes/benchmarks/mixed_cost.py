"""What the mixed form adds to the weights, and what it saves in the recurrent state and in a training step."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from common import RESULTS, parser, token_batch, training_step, write_result
from selective_models import make_model
from torch import nn

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

VOCABULARY = 27
FAMILIES = {"mamba2": "Mamba2", "bamba": "Bamba", "falcon_mamba": "FalconMamba"}
SHARES = (0.75, 0.5, 0.25, 0.125)


def processor_seconds(models: list[nn.Module], batch: dict[str, torch.Tensor], repeats: int) -> list[float]:
    """Processor time of a training step of each model, the least of several that take turns: no load distorts it."""
    least = [float("inf")] * len(models)
    steps = [training_step(model, batch) for model in models]
    with fast_cpu_scan():
        for turn in range(repeats + 1):
            for place, step in enumerate(steps):
                start = time.process_time()
                step()
                if turn:
                    least[place] = min(least[place], time.process_time() - start)
    return least


def main(arguments: list[str] | None = None) -> None:
    """Cut models of several widths and state sizes to several smaller ones, and count and time each."""
    made = parser(__doc__)
    made.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    made.add_argument("--sizes", type=int, nargs="+", default=[16, 64])
    made.add_argument("--batch", type=int, nargs=2, default=[8, 128], help="sequences and steps")
    made.add_argument("--output-dir", type=Path, default=RESULTS)
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    batch = token_batch(*options.batch, VOCABULARY)
    figures, rows = [], []
    for family, name in FAMILIES.items():
        for width, size in ((width, size) for width in options.widths for size in options.sizes):
            torch.manual_seed(0)
            whole = make_model(family, VOCABULARY, size, width=width)
            cuts = [copy.deepcopy(whole) for _ in SHARES]
            sizes = [int(size * share) for share in SHARES]
            records = [compress(cut, [batch], CompreSSMConfig(state_size=r)) for cut, r in zip(cuts, sizes)]
            before, *after = processor_seconds([whole, *cuts], batch, options.repeats)
            for r, record, seconds in zip(sizes, records, after):
                state_before, state_after = record.state_bytes
                added = 4 * (record.parameters_after - record.parameters_before)
                saved, faster = state_before - state_after, before / seconds
                figures.append({
                    "family": family, "width": width, "N": size, "r": r, "parameters": record.parameters_before,
                    "added_bytes": added, "saved_bytes": saved, "faster": faster,
                })  # fmt: skip
                pays = "yes" if added <= saved else "no"
                share = f"{added / 4 / record.parameters_before:+.1%}"
                rows.append(
                    [name, str(width), f"{size} -> {r}", f"{added:+,}", share, f"{saved:,}", pays, f"{faster:.2f}x"]
                )
    write_result(
        "mixed_cost",
        "The mixed form: what it adds and what it saves",
        ["family", "width", "states", "bytes of weights", "of all", "bytes of state saved", "pays", "training step"],
        rows,
        figures,
        "State: of one sequence. Pays: the state saves at least what is added to the weights. Training step: processor "
        "time of one thread before the cut, divided by that after it; the least of several that take turns.",
        folder=options.output_dir,
    )


if __name__ == "__main__":
    main()
