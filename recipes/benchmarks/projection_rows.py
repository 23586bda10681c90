"""
What it costs a mixed model to give up rows of its projections, right after the cut.

    python recipes/benchmarks/projection_rows.py [--processes 2] [--families mamba2 jamba] [--seeds 3]
    python recipes/benchmarks/projection_rows.py --data text --data-files FILE ...

Small models of 64 states are trained, cut to 8 in the mixed form, and then give up half of the rows of B and C, and
three quarters. The table is written anew after every model and seed; families that are left out keep the figures of an
earlier run.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, write_result
from selective_accuracy import append, make_task, train
from selective_models import STATE_SIZE

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

FAMILIES = ("mamba2", "bamba", "falcon_mamba", "jamba")
SIZE = 8
SHARES = {"1/2": 0.5, "1/4": 0.25}


def measure(work: tuple[str, int], options: Any) -> tuple[str, dict[str, Any]]:
    """Figure and parameters of one family and seed: uncut, mixed, and mixed with some of the rows."""
    torch.set_num_threads(1)
    family, seed = work
    task = make_task(options)
    batch = {name: torch.stack(list(task.train[:128][name])) for name in ("input_ids", "labels")}
    figures: dict[str, Any] = {}

    def note(name: str, model: torch.nn.Module) -> None:
        figures[name] = {"figure": task.judge(model), "parameters": model.num_parameters()}

    with fast_cpu_scan():
        model = train(family, task, seed, options.steps or task.steps)
        note("uncut", model)
        compress(model, [batch], CompreSSMConfig(state_size=SIZE, seed=seed), progress=False)
        note("all", model)
        for name, share in SHARES.items():
            narrower = copy.deepcopy(model)
            config = CompreSSMConfig(state_size=SIZE, projection_rows=share, seed=seed)
            record = compress(narrower, [batch], config, progress=False)
            if record.outcome != "cut":
                raise SystemExit(f"{family}: no rows went: {record.summary()}")
            note(name, narrower)
    return family, figures


def _mean_and_spread(values: list[float], form: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {spread:{form.lstrip('+')}}"


def _rows(figures: dict[str, Any], is_accuracy: bool) -> list[list[str]]:
    rows = []
    for family, found in figures.items():
        mixed = found["all"]["figure"]
        for name, one in found.items():
            change = ""
            if name in SHARES:
                scale = [1.0 if is_accuracy else value for value in mixed]
                points = [100 * (v - m) / s for v, m, s in zip(one["figure"], mixed, scale)]
                change = _mean_and_spread(points, "+.2f")
            size = STATE_SIZE if name == "uncut" else SIZE
            count = STATE_SIZE if name in ("uncut", "all") else int(SHARES[name] * STATE_SIZE)
            [parameters] = set(one["parameters"])
            whole = found["uncut"]["parameters"][0]
            cells = [str(size), str(count), f"{parameters:,} ({parameters / whole - 1:+.0%})"]
            rows.append([family, *cells, _mean_and_spread(one["figure"], ".4f"), change])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train, cut, narrow, and write the table."""
    made = parser(__doc__)
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    made.add_argument("--seeds", type=int, default=3, help="models to train of each kind")
    made.add_argument("--steps", type=int, help="training steps of each; default: the task's")
    made.add_argument("--processes", type=int, default=1, help="processes that share the work, one thread each")
    made.add_argument("--data", choices=("digits", "text"), default="digits")
    made.add_argument("--data-files", nargs="+", default=(), help="text files, for --data text")
    made.add_argument("--output-dir", type=Path, default=RESULTS)
    made.set_defaults(data_dir=None)
    options = made.parse_args(arguments)
    if options.data == "text" and not options.data_files:
        raise SystemExit("--data text needs --data-files")
    path = options.output_dir / f"{_name(options)}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    figures = {family: found for family, found in known.items() if family not in options.families}
    work = [(family, seed) for seed in range(options.seeds) for family in options.families]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for family, found in pool.imap_unordered(partial(measure, options=options), work):
            append(figures.setdefault(family, {}), found)
            write(options, {name: figures[name] for name in FAMILIES if name in figures})


def _name(options: Any) -> str:
    return "projection_rows" if options.data == "digits" else f"projection_rows_{options.data}"


def write(options: Any, figures: dict[str, Any]) -> None:
    """Write the table of one kind of data."""
    task = make_task(options)
    is_accuracy = "accuracy" in task.figure
    seeds = ", ".join(f"{name}: {len(found['all']['figure'])}" for name, found in figures.items())
    unit = "points" if is_accuracy else "%"
    write_result(
        _name(options),
        f"{task.figure.capitalize()} right after a mixed model gave up rows of B and C ({options.data})",
        ["family", "states", "rows of B and of C", "parameters", task.figure, f"change by the rows alone, {unit}"],
        _rows(figures, is_accuracy),
        figures,
        f"Small causal models (width 32, two state-space layers of {STATE_SIZE} states, in jamba and bamba an "
        f"attention layer between them), plain Trainer, {options.steps or task.steps} steps of {task.batch_size} "
        f"examples, then `compress` with state_size={SIZE}, and again with projection_rows; no training after it, "
        "calibrated on 128 "
        f"training examples. Mean and standard deviation over seeds ({seeds}); the last column compares model by model "
        f"({'positive is better' if is_accuracy else 'positive is worse'}).",
        folder=options.output_dir,
    )


if __name__ == "__main__":
    main()
