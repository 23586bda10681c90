"""
Mamba cut from 128 states to 12 while it trains, against the full size and 12 states from scratch.

    python recipes/benchmarks/mamba_128_to_12.py [--processes 2] [--seeds 3]
    python recipes/benchmarks/mamba_128_to_12.py --data fashion_mnist [--data-dir FOLDER]
    python recipes/benchmarks/mamba_128_to_12.py --data text --data-files FILE ...

Models that the table has are not trained again: move the JSON file away for figures of the present code.

128 to 12 is the cut that Chahine et al., 2026 (arXiv 2510.02823) report of Mamba. What a training step costs at each of
these sizes is in the table of `step_time.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from functools import partial
from typing import Any

import torch
from common import RESULTS, parser, write_result
from selective_accuracy import append, make_task, train

from hf_compressm import CompreSSMCallback, CompreSSMConfig, fast_cpu_scan

FULL, KEPT = 128, 12
MOMENTS = (0.1, 0.3)
DATA = ("digits", "fashion_mnist", "text")


def measure(seed: int, options: Any) -> dict[str, float]:
    """The figures of one seed."""
    torch.set_num_threads(1)
    task = make_task(options)
    run = partial(train, "mamba", task, seed, options.steps or task.steps)
    with fast_cpu_scan():
        figures = {"full": task.judge(run(FULL)), "from scratch": task.judge(run(KEPT))}
        for moment in MOMENTS:
            config = CompreSSMConfig(state_size=KEPT, window=(0.0, moment), seed=seed)
            callback = CompreSSMCallback(config)
            figures[f"{moment:.0%}"] = task.judge(run(FULL, callbacks=[callback]))
            if callback.records[-1].outcome != "cut":
                raise SystemExit(f"nothing was cut: {callback.records[-1].summary()}")
    return figures


def main() -> None:
    """Train, and write the table of all data that were measured so far."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="models to train of each kind")
    options.add_argument("--steps", type=int, help="training steps of each; default: the task's")
    options.add_argument("--processes", type=int, default=1, help="processes that share the work, one thread each")
    options.add_argument("--data", choices=DATA, default="digits")
    options.add_argument("--data-dir", help="folder with the IDX files, for --data fashion_mnist; default: the Hub's")
    options.add_argument("--data-files", nargs="+", default=(), help="text files, for --data text")
    options = options.parse_args()
    if options.data == "text" and not options.data_files:
        raise SystemExit("--data text needs --data-files")
    path = RESULTS / "mamba_128_to_12.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    known = figures.setdefault(options.data, {})
    seeds = range(len(known.get("full", ())), options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        # In order, so that the number of figures says which seeds are there.
        for found in pool.imap(partial(measure, options=options), seeds):
            append(known, found)
            write({name: figures[name] for name in DATA if name in figures})


def write(figures: dict[str, Any]) -> None:
    """Write the table."""
    names = ["full", "from scratch", *(f"{moment:.0%}" for moment in MOMENTS)]
    rows = [[data, *(_spread(found[name]) for name in names)] for data, found in figures.items()]
    seeds = ", ".join(f"{data}: {len(found['full'])}" for data, found in figures.items())
    write_result(
        "mamba_128_to_12",
        f"Mamba cut from {FULL} states to {KEPT} in training",
        ["data", f"{FULL} states", f"{KEPT} from scratch", *(f"cut at {moment:.0%}" for moment in MOMENTS)],
        rows,
        figures,
        "Stock Mamba of two layers of width 32, plain Trainer; test accuracy of the class token after the pixels of an "
        "image (digits 600 steps of 32, Fashion-MNIST 400 of 16), for text perplexity per byte (lower is better; 400 "
        f"steps of 32). Mean and standard deviation over seeds ({seeds}).",
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


if __name__ == "__main__":
    main()
