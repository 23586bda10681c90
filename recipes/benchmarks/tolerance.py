"""
What a tolerance of 1, 2 and 4% of the Hankel energy does to each family: the states it leaves, and what they cost.

    python recipes/benchmarks/tolerance.py [--processes 2] [--families mamba lru] [--seeds 3]
    python recipes/benchmarks/tolerance.py --data text --data-files FILE ...

The table is written anew after every model and seed. Models that it has are not trained again: move the JSON file away
for figures of the present code.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
from functools import partial
from typing import Any

import torch
from common import RESULTS, parser, write_result
from selective_accuracy import append, make_task, missing, train
from selective_models import FAMILIES, STATE_SIZE, TIME_INVARIANT

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

TOLERANCES = (0.01, 0.02, 0.04)
ALL = {**FAMILIES, **TIME_INVARIANT}


def measure(work: tuple[str, int], options: Any) -> tuple[str, dict[str, Any]]:
    """The states that each tolerance leaves one model, and its figure after the cut."""
    torch.set_num_threads(1)
    family, seed = work
    task = make_task(options)
    batch = {name: torch.stack(list(task.train[:128][name])) for name in ("input_ids", "labels")}
    with fast_cpu_scan():
        model = train(family, task, seed, options.steps or task.steps)
        figures: dict[str, Any] = {"uncut": task.judge(model)}
        for tolerance in TOLERANCES:
            smaller = copy.deepcopy(model)
            record = compress(
                smaller, [batch], CompreSSMConfig(tolerance=tolerance, allow_growth=True, seed=seed), progress=False
            )
            states = max(layer.size_after for layer in record.layers)
            figures[f"{tolerance:.0%}"] = {"states": states, "figure": task.judge(smaller)}
    return family, figures


def main() -> None:
    """Train, cut, and write the table."""
    options = parser(__doc__)
    options.add_argument("--families", nargs="+", choices=sorted(ALL), default=list(ALL))
    options.add_argument("--seeds", type=int, default=3, help="models to train of each family")
    options.add_argument("--steps", type=int, help="training steps of each; default: the task's")
    options.add_argument("--processes", type=int, default=1, help="processes that share the work, one thread each")
    options.add_argument("--data", choices=("digits", "text"), default="digits")
    options.add_argument("--data-files", nargs="+", default=(), help="text files, for --data text")
    options = options.parse_args()
    options.data_dir = None
    if options.data == "text" and not options.data_files:
        raise SystemExit("--data text needs --data-files")
    path = RESULTS / f"tolerance_{options.data}.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        # In order, so that the number of figures says which seeds are there.
        for family, found in pool.imap(partial(measure, options=options), missing(figures, options)):
            append(figures.setdefault(family, {}), found)
            write(options, {name: figures[name] for name in ALL if name in figures})


def write(options: Any, figures: dict[str, Any]) -> None:
    """Write the table of one kind of data."""
    task = make_task(options)
    rows = []
    for family, found in figures.items():
        cells = [_spread(found["uncut"])]
        for tolerance in TOLERANCES:
            kept = found[f"{tolerance:.0%}"]
            cells += [_spread(kept["states"], ".1f"), _spread(kept["figure"])]
        rows.append([family, *cells])
    seeds = ", ".join(f"{name}: {len(found['uncut'])}" for name, found in figures.items())
    write_result(
        f"tolerance_{options.data}",
        f"{task.figure.capitalize()} right after a cut of {STATE_SIZE} states by tolerance ({options.data})",
        ["family", "uncut", *(text for t in TOLERANCES for text in (f"{t:.0%}: states", f"{t:.0%}: {task.figure}"))],
        rows,
        figures,
        f"Small causal models (width 32, two state-space layers of {STATE_SIZE} states, in jamba and bamba an "
        f"attention layer between them), plain Trainer, {options.steps or task.steps} steps of {task.batch_size} "
        "examples; cut by `compress` with its defaults but for the tolerance and `allow_growth`, calibrated on 128 "
        f"training examples, no training after it; mean and standard deviation over seeds ({seeds}).",
    )


def _spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.mean(values):{form}} +- {statistics.stdev(values) if len(values) > 1 else 0.0:{form}}"


if __name__ == "__main__":
    main()
