"""
What a cut of the key dimension costs linear attention (gated DeltaNet, Kimi delta attention, lightning attention and
xLSTM): right after it, by how it is cut, and at the end of a training that it was in.

    python recipes/benchmarks/delta_rule_accuracy.py [--families gated_delta_net kimi_delta] [--seeds 2]
    python recipes/benchmarks/delta_rule_accuracy.py --data fashion_mnist [--data-dir FOLDER]
    python recipes/benchmarks/delta_rule_accuracy.py --data text --data-files FILE ... --in-training

The tables are written anew after every model; started again, the script goes on with those that are missing.
"""

from __future__ import annotations

import copy
import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import scipy.linalg
import torch
from common import RESULTS, parser, provenance, write_result
from delta_rule_models import FAMILIES, KEY_SIZE, make_delta_rule_model
from delta_rule_training import Loss, Trained, snapshots, train
from selective_tasks import Task, digits_task, fashion_mnist_task, text_task
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan
from hf_compressm.architectures import all_changes, find_layers
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.systems import Truncation, greedy_selection_truncation, selection_truncation

KEPT = (32, 16, 8, 4)
IN_TRAINING_SIZES = (8, 4)
MOMENTS = (0.1, 0.3, 0.5)
LEARNING_RATE = 3e-3
# Perplexities differ by less than accuracies, so that what a cut is made with counts for more.
CALIBRATION_ROWS = {"digits": 64, "fashion_mnist": 64, "text": 256}
IN_TRAINING_ROWS = 64
# Of the loss of the next pixel, beside that of the class: there is more to learn from than one token a sequence.
NEXT_PIXEL = 0.2
# Every way to cut is judged on them, so that there are fewer than of other benchmarks.
TEST_IMAGES = 500


class Vectors:
    """Keeps the keys and queries of a layer, after their norm: `(key heads, steps, N)`."""

    def observe(self, inputs, output):
        """Keep those of a forward pass."""
        self.keys, self.queries = (x.detach().double().flatten(0, 1).transpose(0, 1) for x in (inputs.B, inputs.C))
        return output


class Seen:
    """What the calibration rows show of one layer: its Gramians, keys and queries."""

    def __init__(self, gramians: Any, vectors: Vectors) -> None:
        self.gramians, self.keys, self.queries = gramians, vectors.keys, vectors.queries


Method = Callable[[Seen, int], Truncation]


def ours(reductor: str) -> Method:
    """A reductor of this library with its own settings."""
    return lambda seen, r: seen.gramians.truncate(r, reductor, CompreSSMConfig())


def channels_of_gramians(observability: str) -> Method:
    """A greedy choice of channels by P and one of the two Gramians of the output: `Q` of the loss, `R` of queries."""
    return lambda seen, r: greedy_selection_truncation(seen.gramians.P, getattr(seen.gramians, observability), r)


def channels_of_interpolation(seen: Seen, r: int) -> Truncation:
    """The channels that an interpolative cut keeps."""
    chosen = seen.gramians.truncate(r, "interpolative", CompreSSMConfig())
    return Truncation.from_indices(chosen.indices, KEY_SIZE)


def channels_by_squares(seen: Seen, r: int) -> Truncation:
    """The channels with the largest product of the mean squares of keys and of queries."""
    return selection_truncation(seen.keys.square().mean(1) * seen.queries.square().mean(1), r)


def channels_by_pivoted_qr(seen: Seen, r: int) -> Truncation:
    """The first pivots of a rank-revealing QR of the rows of keys and queries (after Nazari and Rusch, 2026)."""
    rows = torch.cat([seen.keys, seen.queries / seen.queries.square().mean((1, 2), keepdim=True).sqrt()], 1)
    pivots = [scipy.linalg.qr(part.numpy(), mode="r", pivoting=True)[1][:r] for part in rows]
    return Truncation.from_indices(torch.stack([torch.tensor(sorted(p)).long() for p in pivots]), KEY_SIZE)


def eigenvectors_of(name: str) -> Method:
    """The leading eigenvectors of the covariance of keys or of queries."""

    def truncation(seen: Seen, r: int) -> Truncation:
        rows = getattr(seen, name)
        U = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., -r:]
        return Truncation(T=U, W=U.clone())

    return truncation


def random_channels(seen: Seen, r: int) -> Truncation:
    """Random channels."""
    generator = torch.Generator().manual_seed(0)
    return selection_truncation(torch.zeros(seen.keys.shape[::2]), r, "random", generator)


CHANNELS: dict[str, Method] = {
    "channels, greedy with P and Q": channels_of_gramians("Q"),
    "channels, greedy with P and R": channels_of_gramians("R"),
    "channels of the interpolative cut": channels_of_interpolation,
    "channels, random": random_channels,
    "channels, E[k^2] E[q^2]": channels_by_squares,
    "channels, pivoted QR of keys and queries": channels_by_pivoted_qr,
}
EIGENVECTORS: dict[str, Method] = {
    "eigenvectors of the keys, mixed": eigenvectors_of("keys"),
    "eigenvectors of the queries, mixed": eigenvectors_of("queries"),
}
BESIDE_BALANCED: dict[str, Method] = {
    "orthonormal": ours("orthonormal"),
    "interpolative": ours("interpolative"),
    **CHANNELS,
    **EIGENVECTORS,
}
# What `compress` makes of a trained model: the default with its matrices fitted to the outputs.
FITTED = "the default, fitted to the outputs"
METHODS: dict[str, dict[str, Method | None]] = {
    "gated_delta_net": {
        "orthonormal, mixed (the default)": ours("orthonormal"),
        FITTED: None,
        "interpolative, mixed": ours("interpolative"),
        **CHANNELS,
        **EIGENVECTORS,
    },
    "kimi_delta": {"interpolative, mixed (the default)": ours("interpolative"), FITTED: None, **CHANNELS},
    "minimax": {"balanced, mixed (the default)": ours("balanced"), FITTED: None, **BESIDE_BALANCED},
    "xlstm": {"balanced, folded (the default)": ours("balanced"), **BESIDE_BALANCED},
}
# Of these families no class has fewer keys alone, so that there is no small model from scratch.
ONE_SIZE = ("kimi_delta", "minimax")
# What a state size has to be a multiple of for the model's cache, with the heads of these models.
CACHE_MULTIPLES = {"xlstm": 8}


def new_run(family: str, task: Task, seed: int, key_size: int = KEY_SIZE) -> Trained:
    """A model of two heads a layer and what trains it."""
    torch.manual_seed(seed)
    model = make_delta_rule_model(family, task.vocabulary, key_size)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def loss_function(task: Task, seed: int) -> Loss:
    """The loss of each step; a few pixels more to predict where only the class has a label."""

    def loss_at(model: nn.Module, step: int) -> Tensor:
        torch.manual_seed(1_000_003 * seed + step + 1)
        rows = task.train[torch.randint(0, len(task.train), (task.batch_size,)).tolist()]
        batch = {name: torch.stack(list(rows[name])) for name in ("input_ids", "labels")}
        output = model(**batch)
        if not (batch["labels"] == -100).any():
            return output.loss
        pixels = batch["input_ids"][:, 1:-1]
        next_pixel = nn.functional.cross_entropy(output.logits[:, :-2].flatten(0, 1), pixels.flatten())
        return output.loss + NEXT_PIXEL * next_pixel

    return loss_at


def right_after(
    family: str, model: nn.Module, task: Task, batch: dict[str, Tensor], known: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """The figure of copies of a model that are cut in every way, by method and size, with no training after it."""
    model.eval()
    layers, vectors = find_layers(model), []
    for layer in layers:
        vectors.append(Vectors())
        with layer.observed(vectors[-1]), torch.no_grad():
            model(input_ids=batch["input_ids"])
    gramians = calibrate(model, layers, [batch], progress=False).gramians
    seen = [Seen(gramians[layer.name], each) for layer, each in zip(layers, vectors)]
    sizes = [kept for kept in KEPT if kept % layers[0].cache_multiple == 0]
    found = dict(known)
    for name, method in METHODS[family].items():
        if name in found:
            continue
        copies = (
            fitted(model, batch, r) if method is None else cut(model, [method(s, r) for s in seen], name) for r in sizes
        )
        found[name] = {str(r): task.judge(smaller) for r, smaller in zip(sizes, copies)}
    return found


def fitted(model: nn.Module, batch: dict[str, Tensor], size: int) -> nn.Module:
    """A copy that is cut as a user cuts a trained model."""
    smaller = copy.deepcopy(model)
    record = compress(smaller, [batch], CompreSSMConfig(state_size=size), progress=False)
    if record.outcome != "cut":
        raise SystemExit(f"nothing was cut: {record.summary()}")
    return smaller.eval()


def cut(model: nn.Module, truncations: list[Truncation], name: str) -> nn.Module:
    """A copy that is cut."""
    smaller = copy.deepcopy(model)
    layers = find_layers(smaller)
    if "mixed" in name and smaller.config.model_type == "qwen3_next":
        # Without its indices a choice of channels is combined behind the norm, not selected in front of it.
        truncations = [Truncation(T=each.T, W=each.W) for each in truncations]
    reductions = [layer.reduce(truncation) for layer, truncation in zip(layers, truncations)]
    ModelChange(smaller, reductions, all_changes(smaller, layers, reductions)).commit()
    return smaller.eval()


def is_complete(model: dict[str, Any]) -> bool:
    """Whether all methods have a figure."""
    return all(name in model.get("right after", ()) for name in METHODS[model["family"]])


def in_training_sizes(family: str) -> list[int]:
    """The sizes that the family's cache can have."""
    return [size for size in IN_TRAINING_SIZES if size % CACHE_MULTIPLES.get(family, 1) == 0]


def is_cut_in_training(model: dict[str, Any]) -> bool:
    """Whether all sizes were cut to in the training."""
    return all(str(size) in model.get("in training", ()) for size in in_training_sizes(model["family"]))


def results_of_model(
    family: str, task: Task, seed: int, steps: int, in_training: bool, known: dict[str, Any], rows: int
) -> Iterator[dict[str, Any]]:
    """What is known of one family and seed, as it becomes more."""
    loss_at = loss_function(task, seed)
    seen = task.train[:rows]
    batch = {name: torch.stack(list(seen[name])) for name in ("input_ids", "labels")}
    # As much as two batches of the training show.
    part = {name: tensor[:IN_TRAINING_ROWS] for name, tensor in batch.items()}
    copies = snapshots(new_run(family, task, seed), loss_at, MOMENTS, steps, LEARNING_RATE)
    found = {**known, "family": family, "seed": seed, "steps": steps, "uncut": task.judge(copies[1.0][0])}
    if not (known and is_complete(known)):
        # What is known of another model, as another machine trains it, says nothing of this one.
        kept = known.get("right after", {}) if known.get("uncut") == found["uncut"] else {}
        found["right after"] = right_after(family, copies[1.0][0], task, batch, kept)
        yield found
    if not in_training:
        return
    figures = dict(known.get("in training", {})) if known.get("uncut") == found["uncut"] else {}
    for size in [size for size in in_training_sizes(family) if str(size) not in figures]:
        figures[str(size)] = {}
        if family not in ONE_SIZE:
            run = new_run(family, task, seed, size)
            train(run, loss_at, 0, steps, steps, LEARNING_RATE)
            figures[str(size)]["from scratch"] = task.judge(run[0])
        for moment in MOMENTS:
            run = copy.deepcopy(copies[moment])
            record = compress(run[0], [part], CompreSSMConfig(state_size=size), optimizer=run[1], progress=False)
            if record.outcome != "cut":
                raise SystemExit(f"{family}: nothing was cut: {record.summary()}")
            train(run, loss_at, round(moment * steps), steps, steps, LEARNING_RATE)
            figures[str(size)][f"cut at {moment:.0%}"] = task.judge(run[0])
        yield {**found, "in training": dict(figures)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, cut, and write the tables after each model."""
    made = parser(__doc__)
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    made.add_argument("--seeds", type=int, default=2, help="models to train of each family")
    made.add_argument("--steps", type=int, help="training steps of each; default: the task's")
    made.add_argument("--in-training", action="store_true", help="also cut in the training, and train small ones")
    made.add_argument("--data", choices=("digits", "fashion_mnist", "text"), default="digits")
    made.add_argument("--data-dir", help="folder with the IDX files, for --data fashion_mnist; default: the Hub's")
    made.add_argument("--data-files", nargs="+", default=(), help="text files, for --data text")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="where tables go, and where models are known")
    options = made.parse_args(arguments)
    if options.data == "text" and not options.data_files:
        raise SystemExit("--data text needs --data-files")
    task = {
        "digits": digits_task,
        "fashion_mnist": partial(fashion_mnist_task, options.data_dir, test_examples=TEST_IMAGES),
        "text": partial(text_task, options.data_files),
    }[options.data]()
    options.steps = options.steps or task.steps
    path = options.output_dir / f"delta_rule_cut_{options.data}.json"
    models = json.loads(path.read_text()) if path.exists() else []
    if any(model["steps"] != options.steps for model in models):
        raise SystemExit(f"{path} has models of another number of steps than {options.steps}; move it away first.")
    known = {(model["family"], model["seed"]): model for model in models}
    torch.set_num_threads(1)
    with fast_cpu_scan():
        for seed in range(options.seeds):
            for family in options.families:
                before = known.get((family, seed), {})
                if before and is_complete(before) and (is_cut_in_training(before) or not options.in_training):
                    continue
                for found in results_of_model(
                    family, task, seed, options.steps, options.in_training, before, CALIBRATION_ROWS[options.data]
                ):
                    makers = dict.fromkeys([*before.get("made by", ()), provenance()])
                    known[family, seed] = {**found, "made by": list(makers)}
                    write(options, task, [known[key] for key in sorted(known)])
    # Where nothing was missing, the tables are written with what this command says.
    write(options, task, [known[key] for key in sorted(known)])


def write(options: Namespace, task: Task, models: Sequence[dict[str, Any]]) -> None:
    """Write the tables of one kind of data."""
    note = _note(options, task, models)
    rows = []
    for family in FAMILIES:
        members = [model for model in models if model["family"] == family]
        if not members:
            continue
        rows.append([family, "uncut", _mean_and_spread([model["uncut"] for model in members]), "", "", ""])
        for name in METHODS[family]:
            figures = [[model["right after"].get(name, {}).get(str(kept)) for model in members] for kept in KEPT]
            cells = ["-" if None in values else _mean_and_spread(values) for values in figures]
            rows.append(["", name, *cells])
    write_result(
        f"delta_rule_cut_{options.data}",
        f"{task.figure.capitalize()} right after cutting d_k = {KEY_SIZE} of linear attention ({options.data})",
        ["family", "method", *(f"r = {kept}" for kept in KEPT)],
        rows,
        models,
        f"{note} No training after the cut; calibrated on {CALIBRATION_ROWS[options.data]} training examples. "
        "Channels of gated DeltaNet are selected before the norm, as a stock class keeps them; those of Kimi delta "
        "attention behind it.",
        _makers(models),
        options.output_dir,
    )
    trained = [model for model in models if "in training" in model]
    columns = ["from scratch", *(f"cut at {moment:.0%}" for moment in MOMENTS)]
    rows = []
    for family in FAMILIES:
        sizes = {size for model in trained if model["family"] == family for size in model["in training"]}
        for size in sorted(sizes, key=int, reverse=True):
            members = [model for model in trained if model["family"] == family and size in model["in training"]]
            figures = [[model["in training"][size].get(column) for model in members] for column in columns]
            cells = ["-" if None in values else _mean_and_spread(values) for values in figures]
            full = _mean_and_spread([model["uncut"] for model in members])
            rows.append([family, size, full, *cells, str(len(members))])
    if rows:
        write_result(
            f"delta_rule_training_{options.data}",
            f"{task.figure.capitalize()} at the end of training, d_k of linear attention cut in it ({options.data})",
            ["family", "r", f"d_k = {KEY_SIZE} throughout", *columns, "seeds"],
            rows,
            trained,
            f"{_note(options, task, trained)} Cut in the mixed form, settings as by default.",
            _makers(trained),
            options.output_dir,
        )


def _note(options: Namespace, task: Task, models: Sequence[dict[str, Any]]) -> str:
    """What the models of a table are."""
    seeds = {family: sum(model["family"] == family for model in models) for family in FAMILIES}
    return (
        "Two layers of two heads (Qwen3-Next's gated DeltaNet, Kimi Linear's delta attention, MiniMax's lightning "
        f"attention) or eight (xLSTM, whose cache takes multiples of 8 then), {options.steps} steps of "
        f"{task.batch_size} examples; mean and standard deviation of the {task.figure} over seeds "
        f"({', '.join(f'{family}: {count}' for family, count in seeds.items() if count)})."
    )


def _makers(models: Sequence[dict[str, Any]]) -> str:
    """The commands that the figures of some models come from: one, or several one after the other."""
    return "; and by ".join(dict.fromkeys(maker for model in models for maker in model["made by"]))


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


if __name__ == "__main__":
    main()
