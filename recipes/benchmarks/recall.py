"""
Associative recall of linear attention by the size of its state: full, small from scratch, and cut.

A sequence holds pairs of a key and a value, then every key once more in another order; the model says the value of each
(multi-query associative recall: Arora et al., 2023, "Zoology", arXiv 2312.04927). A state of d_k keys can hold about
d_k pairs, so that here its size decides what can be recalled.

    python recipes/benchmarks/recall.py [--family kimi_delta] [--seeds 3]

The table is written anew after every run; started again, the script goes on with the runs that are missing.
"""

from __future__ import annotations

import copy
import json
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, write_result
from delta_rule_models import make_delta_rule_model
from delta_rule_training import Loss, Trained, snapshots, train
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

FULL = 64
SIZES = (32, 16)
MOMENTS = (0.1, 0.3, 0.5, 1.0)
FORMS = {"mixed": {}, "selection": {"stock": True}}
STOCK_MOMENTS = (1.0,)
KEYS, VALUES = 64, 16
PAIRS = (4, 8, 16, 32, 64)
LEARNING_RATE = 6e-3
NAMES = {
    "gated_delta_net": "gated DeltaNet",
    "kimi_delta": "Kimi delta attention",
    "minimax": "lightning attention",
}
# What the models are, beside their keys: where one size is for keys and values, small ones have small values too.
MODELS = {
    "gated_delta_net": "Qwen3-Next with one head, values of 32 entries",
    "kimi_delta": "Kimi Linear with one head, keys and values of one size, which a model from scratch has small both",
    "minimax": "MiniMax with one head, keys and values of one size, which a model from scratch has small both",
}
# Queries of a batch, whatever the number of pairs: many short sequences at first, few long ones later.
QUERIES = 512
# The shares of the training after which the number of pairs grows, and after which it has grown to the largest one.
# Models find out what to do in the first one, some later than others.
GROWTH = (0.25, 0.5)
TEST_ROWS = 128
CALIBRATION_ROWS = 64


def sequences(pairs: int, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """
    Pairs and queries as tokens.

    Args:
        pairs (`int`): Pairs of a sequence, all with different keys.
        rows (`int`): Sequences.
        generator (`torch.Generator`): Draws keys, values and the order of the queries.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `labels`, int64 of shape `(rows, 3 * pairs + 1)`. As a causal model
        is asked for the next token, the value of a query is the label of the token behind it, and one more ends it all.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(1)
    end = torch.full((rows, 1), KEYS + VALUES)
    tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order), end], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, 2 * pairs + 1 :] = values.gather(1, order)
    return {"input_ids": tokens, "labels": labels}


def training_batch(seed: int, step: int, steps: int) -> dict[str, Tensor]:
    """The batch of a step: the same one for every run of a seed, with more pairs as the training goes on."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step + 1)
    begin, end = GROWTH
    grown = (step / steps - begin) / (end - begin)
    reached = 1 if grown < 0 else min(len(PAIRS), 2 + int(grown * (len(PAIRS) - 1)))
    is_new, earlier = torch.rand((), generator=generator) < 0.5, torch.randint(0, reached, (), generator=generator)
    pairs = PAIRS[reached - 1 if is_new else int(earlier)]
    return sequences(pairs, QUERIES // pairs, generator)


def new_run(family: str, seed: int, key_size: int) -> Trained:
    """A model of one head a layer, and what trains it."""
    torch.manual_seed(seed)
    model = make_delta_rule_model(family, KEYS + VALUES + 1, key_size, heads=1)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            # With one head the luck of the draw would decide whether anything is remembered.
            parameter.data.zero_()
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def loss_function(seed: int, steps: int) -> Loss:
    """The loss of each step of the runs of one seed."""
    return lambda model, step: model(**training_batch(seed, step, steps)).loss


@torch.no_grad()
def recall(model: nn.Module) -> dict[str, float]:
    """The share of queries of test sequences that are answered right, by the number of pairs."""
    model.eval()
    shares = {}
    for pairs in PAIRS:
        test = sequences(pairs, TEST_ROWS, torch.Generator().manual_seed(pairs))
        asked = slice(2 * pairs, 3 * pairs)
        found = torch.cat([model(input_ids=part).logits[:, asked].argmax(-1) for part in test["input_ids"].split(64)])
        shares[str(pairs)] = (found == test["labels"][:, 2 * pairs + 1 :]).float().mean().item()
    return shares


Key = tuple[int, str, int, float]


def wanted(family: str, seeds: int, sizes: Sequence[int]) -> list[Key]:
    """What is to be run: seed, form, size, and the moment of the cut as a share of the training (0: none)."""
    runs: list[Key] = []
    for seed in range(seeds):
        runs.append((seed, "full", FULL, 0.0))
        runs += [(seed, "from scratch", size, 0.0) for size in sizes]
        runs += [(seed, "mixed", size, moment) for size in sizes for moment in MOMENTS]
        if family == "gated_delta_net":
            # The others have no stock class that holds a smaller key.
            runs += [(seed, "selection", size, moment) for size in sizes for moment in STOCK_MOMENTS]
    return runs


def results_of_seed(family: str, seed: int, missing: Sequence[Key], steps: int) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Every missing run of one seed and what came out of it."""
    loss_at = loss_function(seed, steps)
    for key in missing:
        if key[1] == "from scratch":
            run = new_run(family, seed, key[2])
            train(run, loss_at, 0, steps, steps, LEARNING_RATE)
            yield key, {"recall": recall(run[0])}
    cuts = [key for key in missing if key[1] != "from scratch"]
    if not cuts:
        return
    # All cuts of a seed start from the one training at full size.
    copies = snapshots(new_run(family, seed, FULL), loss_at, MOMENTS, steps, LEARNING_RATE)
    batch = sequences(PAIRS[-1], CALIBRATION_ROWS, torch.Generator().manual_seed(seed + 1))
    for key in cuts:
        _, form, size, moment = key
        if form == "full":
            model, _ = copies[1.0]
            record = compress(copy.deepcopy(model), [batch], CompreSSMConfig(), progress=False)
            yield key, {"recall": recall(model), "default keeps": [layer.wanted_size for layer in record.layers]}
            continue
        run = copy.deepcopy(copies[moment])
        config = CompreSSMConfig(state_size=size, seed=seed, **FORMS[form])
        record = compress(run[0], [batch], config, optimizer=run[1], progress=False)
        if record.outcome != "cut":
            raise SystemExit(f"{key}: nothing was cut: {record.summary()}")
        at_once = recall(run[0])
        train(run, loss_at, round(moment * steps), steps, steps, LEARNING_RATE)
        yield key, {"recall": recall(run[0]), "right after": at_once}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table after each run."""
    made = parser(__doc__)
    made.add_argument("--family", choices=NAMES, default="gated_delta_net", help="the kind of linear attention")
    made.add_argument("--seeds", type=int, default=3, help="models to train of each kind")
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="states to cut to, and to start with")
    made.add_argument("--steps", type=int, default=600, help="training steps of each")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="where the table goes, and where runs are known")
    options = made.parse_args(arguments)
    path = options.output_dir / f"{table_name(options.family)}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    if any(run["steps"] != options.steps for run in runs):
        raise SystemExit(f"{path} has runs of another number of steps than {options.steps}; move it away first.")
    done = {(run["seed"], run["form"], run["size"], run["moment"]) for run in runs}
    torch.set_num_threads(1)
    with fast_cpu_scan():
        for seed in range(options.seeds):
            missing = [
                key
                for key in wanted(options.family, options.seeds, options.sizes)
                if key[0] == seed and key not in done
            ]
            for key, result in results_of_seed(options.family, seed, missing, options.steps):
                names = ("seed", "form", "size", "moment")
                runs.append({**dict(zip(names, key)), "steps": options.steps, **result})
                write(options, runs)
    # Where nothing was missing, the table is written with what this command says.
    write(options, runs)


def table_name(family: str) -> str:
    """The name of the table of a family."""
    return "recall" if family == "gated_delta_net" else f"recall_{family}"


def write(options: Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """Write the table of all runs so far."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=_place):
        groups.setdefault((run["form"], run["size"], run["moment"]), []).append(run)
    rows = []
    for (form, size, moment), members in groups.items():
        what = form if not moment else f"{form}, cut after {moment:.0%}" if moment < 1 else f"{form}, cut at the end"
        shares = [_mean_and_spread([run["recall"][str(pairs)] for run in members]) for pairs in PAIRS]
        rows.append([what, str(size), *shares, str(len(members))])
    kept = [run["default keeps"] for run in runs if "default keeps" in run]
    asked = " and ".join(f"{min(sizes)} to {max(sizes)}" for sizes in zip(*kept)) or "not known"
    write_result(
        table_name(options.family),
        f"Recall of {NAMES[options.family]} by the number of pairs, d_k = {FULL} and cut",
        ["model", "d_k", *(f"{pairs} pairs" for pairs in PAIRS), "seeds"],
        rows,
        sorted(runs, key=lambda run: (run["seed"], *_place(run))),
        f"Share of queries answered right ({TEST_ROWS} test sequences; chance: {1 / VALUES:.3f}), mean and standard "
        f"deviation over seeds. Two layers of {MODELS[options.family]}, {KEYS} keys and {VALUES} "
        f"values to draw from, {options.steps} steps of {QUERIES} queries; {PAIRS[0]} pairs "
        f"in the first {GROWTH[0]:.0%}, then more and more, up to {PAIRS[-1]} after {GROWTH[1]:.0%}. Calibrated on "
        f"{CALIBRATION_ROWS} sequences of {PAIRS[-1]} pairs. Cut at the end: no training after it. The spectra of the "
        f"two trained layers ask, at the default tolerance of 1%, for {asked} of {FULL} states.",
        folder=options.output_dir,
    )


def _place(run: dict[str, Any]) -> tuple[int, int, float]:
    return ("full", "from scratch", "mixed", "selection").index(run["form"]), -run["size"], run["moment"]


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


if __name__ == "__main__":
    main()
