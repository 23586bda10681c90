"""
What a cut costs Mamba-2, FalconMamba, Jamba and a hybrid: right after it, and at the end of a training that it was in.

    python recipes/benchmarks/selective_accuracy.py [--processes 2] [--families mamba2 jamba] [--seeds 3]
    python recipes/benchmarks/selective_accuracy.py --data fashion_mnist [--data-dir FOLDER]
    python recipes/benchmarks/selective_accuracy.py --data text --data-files FILE ...

The tables are written anew after every model and seed. Models that they have are not trained again: move the JSON file
away for figures of the present code. `--refresh FORM ...` measures some of the forms right after the cut again, in
place of what is known of them, and nothing else; `--refresh` alone measures all of them.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import RESULTS, parser, write_result
from selective_models import FAMILIES, STATE_SIZE, make_model
from selective_tasks import Task, digits_task, fashion_mnist_task, text_task
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, fast_cpu_scan

KEPT = (32, 16, 8, 4)
SELECTION = {"stock": True, "reductor": "selection"}
FORMS = {
    "mixed, the family's default": {},
    "mixed, interpolative": {"reductor": "interpolative"},
    "selection, greedy": SELECTION,
    "selection, diagonal Hankel score": {**SELECTION, "selection_score": "hankel"},
    "selection, sum h^2 C^2 (GHOST)": {**SELECTION, "selection_score": "readout_energy"},
    "selection, random": {**SELECTION, "selection_rule": "random"},
}
# Families of which the interpolative choice is the default need no second row for it.
ALREADY_DEFAULT = dict.fromkeys(("mamba", "falcon_mamba", "jamba"), "mixed, interpolative")
# About 16,000 to 32,000 steps.
CALIBRATION_ROWS = {"digits": 256, "fashion_mnist": 128, "text": 256}
IN_TRAINING = {"mixed": {}, "selection, greedy": FORMS["selection, greedy"]}
IN_TRAINING_SIZE = 8
MOMENTS = (0.1, 0.5)


def train(
    family: str,
    task: Task,
    seed: int,
    steps: int,
    state_size: int = STATE_SIZE,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """One training run with the plain Trainer; returns the trained model."""
    set_seed(seed)
    model = make_model(family, task.vocabulary, state_size)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=task.batch_size,
            learning_rate=4e-3,
            warmup_steps=steps // 20,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=task.train, callbacks=list(callbacks))
        trainer.train()
    return trainer.model


def cut_in_training(family: str, task: Task, seed: int, steps: int, moment: float, settings: dict[str, Any]) -> float:
    """The figure at the end of a training in which the state was cut to 8 at a moment of it."""
    config = CompreSSMConfig(
        strategy="target", target_state_size=IN_TRAINING_SIZE, window=(0.0, moment), seed=seed, **settings
    )
    callback = CompreSSMCallback(config)
    model = train(family, task, seed, steps, callbacks=[callback])
    if callback.records[-1].outcome != "cut":
        raise SystemExit(f"{family}: nothing was cut: {callback.records[-1].summary()}")
    return task.judge(model)


def measure(work: tuple[str, int], options: Any) -> tuple[str, dict[str, Any]]:
    """All figures of one family and seed."""
    torch.set_num_threads(1)
    family, seed = work
    task = make_task(options)
    figures: dict[str, Any] = {"right after": {}, "in training": {}}
    rows = CALIBRATION_ROWS[options.data]
    batch = {name: torch.stack(list(task.train[:rows][name])) for name in ("input_ids", "labels")}
    with fast_cpu_scan():
        model = train(family, task, seed, options.steps)
        figures["uncut"] = task.judge(model)
        for form in options.refresh or forms_of(family):
            if form not in forms_of(family):
                continue
            for kept in KEPT:
                config = CompreSSMConfig(strategy="fixed", keep_ratio=kept / STATE_SIZE, seed=seed, **FORMS[form])
                smaller = copy.deepcopy(model)
                compress(smaller, [batch], config, progress=False)
                figures["right after"].setdefault(form, {})[str(kept)] = task.judge(smaller)
        if options.refresh is not None:
            return family, figures
        for form, settings in IN_TRAINING.items():
            for moment in MOMENTS:
                found = cut_in_training(family, task, seed, options.steps, moment, settings)
                figures["in training"].setdefault(form, {})[f"{moment:.0%}"] = found
        figures["from scratch"] = task.judge(train(family, task, seed, options.steps, IN_TRAINING_SIZE))
    return family, figures


def append(lists: dict[str, Any], values: dict[str, Any]) -> None:
    """Append every figure of one seed to the list at its place."""
    for name, value in values.items():
        if isinstance(value, dict):
            append(lists.setdefault(name, {}), value)
        else:
            lists.setdefault(name, []).append(value)


def forms_of(family: str) -> list[str]:
    """The forms that a family has a row for."""
    return [form for form in FORMS if ALREADY_DEFAULT.get(family) != form]


def replace(family: str, known: dict[str, Any], seed: int, found: dict[str, Any]) -> None:
    """Put the figures right after the cut of one seed in the place of those that are known."""
    forms = forms_of(family)
    known["right after"] = {form: known["right after"][form] for form in forms}
    if set(found["right after"]) == set(forms):
        known["uncut"][seed] = found["uncut"]
    if not math.isclose(known["uncut"][seed], found["uncut"], rel_tol=1e-4):
        raise SystemExit(
            f"seed {seed} has {found['uncut']} before the cut, and had {known['uncut'][seed]}: this machine trains "
            "another model. Give --refresh without a form, so that all of them are measured again."
        )
    for form, by_size in found["right after"].items():
        for kept, value in by_size.items():
            known["right after"][form][kept][seed] = value


def missing(figures: dict[str, Any], options: Any) -> list[tuple[str, int]]:
    """The families and seeds that are asked for and not among the figures."""
    known = {family: len(found["uncut"]) for family, found in figures.items()}
    work = [(family, seed) for seed in range(options.seeds) for family in options.families]
    return [(family, seed) for family, seed in work if seed >= known.get(family, 0)]


def make_task(options: Any) -> Task:
    """The task that the options name."""
    tasks = {
        "digits": digits_task,
        "fashion_mnist": partial(fashion_mnist_task, options.data_dir),
        "text": partial(text_task, options.data_files),
    }
    return tasks[options.data]()


def _mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {spread:{form.lstrip('+')}}"


Pairs = list[tuple[float, float]]


def _against_uncut(form: str, kept: int, found: dict[str, Any]) -> Pairs:
    return list(zip(found["right after"][form][str(kept)], found["uncut"]))


def _against_ghost(form: str, found: dict[str, Any]) -> Pairs:
    return list(zip(*(found["right after"][name]["32"] for name in (form, "selection, sum h^2 C^2 (GHOST)"))))


DIFFERENCES: dict[str, Callable[[dict[str, Any]], Pairs]] = {
    "mixed N/8, against uncut": partial(_against_uncut, "mixed, the family's default", 8),
    "mixed N/16, against uncut": partial(_against_uncut, "mixed, the family's default", 4),
    "greedy N/2, against GHOST": partial(_against_ghost, "selection, greedy"),
    "diagonal N/2, against GHOST": partial(_against_ghost, "selection, diagonal Hankel score"),
}


def _rows_of_differences(figures: dict[str, Any], is_relative: bool) -> list[list[str]]:
    def difference(one: float, other: float) -> float:
        return 100 * (one / other - 1 if is_relative else one - other)

    rows = []
    for family, found in figures.items():
        differences = ([difference(*pair) for pair in find(found)] for find in DIFFERENCES.values())
        rows.append([family, *(_mean_and_spread(values, "+.2f") for values in differences)])
    return rows


def _rows_right_after(figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    for family, found in figures.items():
        rows.append([family, "uncut", _mean_and_spread(found["uncut"]), *[""] * (len(KEPT) - 1)])
        for form, by_size in found["right after"].items():
            rows.append(["", form, *(_mean_and_spread(by_size[str(kept)]) for kept in KEPT)])
    return rows


def _rows_in_training(figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    for family, found in figures.items():
        full, small = _mean_and_spread(found["uncut"]), _mean_and_spread(found["from scratch"])
        for number, (form, by_moment) in enumerate(found["in training"].items()):
            cells = [_mean_and_spread(by_moment[f"{moment:.0%}"]) for moment in MOMENTS]
            rows.append([family, full, small, form, *cells] if number == 0 else ["", "", "", form, *cells])
    return rows


def main() -> None:
    """Train, cut, and write both tables."""
    options = parser(__doc__)
    options.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    options.add_argument("--seeds", type=int, default=3, help="models to train of each kind")
    options.add_argument("--steps", type=int, help="training steps of each; default: the task's")
    options.add_argument("--processes", type=int, default=1, help="processes that share the work, one thread each")
    options.add_argument("--data", choices=("digits", "fashion_mnist", "text"), default="digits")
    options.add_argument("--data-dir", help="folder with the IDX files, for --data fashion_mnist; default: the Hub's")
    options.add_argument("--data-files", nargs="+", default=(), help="text files, for --data text")
    options.add_argument("--refresh", nargs="*", choices=FORMS, metavar="FORM", help="forms to measure again")
    options = options.parse_args()
    if options.data == "text" and not options.data_files:
        raise SystemExit("--data text needs --data-files")
    path = RESULTS / f"selective_cut_{options.data}.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    task = make_task(options)
    options.steps = options.steps or task.steps
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        # In order, so that the number of figures says which seeds are there.
        work = missing(figures, options)
        if options.refresh is not None:
            work = [(family, seed) for family in options.families for seed in range(len(figures[family]["uncut"]))]
        for (family, seed), (_, found) in zip(work, pool.imap(partial(measure, options=options), work)):
            if options.refresh is not None:
                replace(family, figures[family], seed, found)
            else:
                append(figures.setdefault(family, {}), found)
            write(options, task, {name: figures[name] for name in FAMILIES if name in figures})


def write(options: Any, task: Task, figures: dict[str, Any]) -> None:
    """Write the tables of one kind of data."""
    figure = task.figure
    seeds = ", ".join(f"{name}: {len(found['from scratch'])}" for name, found in figures.items())
    note = (
        f"Small causal models (width 32, two state-space layers of 64 states, in jamba and bamba an attention layer "
        f"between them), plain Trainer, {options.steps} steps of {task.batch_size} examples; mean and standard "
        f"deviation of the {figure} over seeds ({seeds})."
    )
    write_result(
        f"selective_cut_{options.data}",
        f"{figure.capitalize()} right after cutting N = 64 ({options.data})",
        ["family", "form", *(f"r = {kept}" for kept in KEPT)],
        _rows_right_after(figures),
        figures,
        f"{note} No training after the cut; calibrated on {CALIBRATION_ROWS[options.data]} training examples.",
    )
    if options.refresh is None:
        write_result(
            f"selective_training_{options.data}",
            f"{figure.capitalize()} at the end of training, cut from N = 64 to {IN_TRAINING_SIZE} ({options.data})",
            ["family", "N = 64 throughout", f"N = {IN_TRAINING_SIZE} from scratch", "form"]
            + [f"cut at {moment:.0%}" for moment in MOMENTS],
            _rows_in_training(figures),
            {family: {"in training": found["in training"]} for family, found in figures.items()},
            note,
        )
    is_relative = "perplexity" in figure
    write_result(
        f"selective_differences_{options.data}",
        f"{figure.capitalize()} right after cutting N = 64, against the same model ({options.data})",
        ["family", *DIFFERENCES],
        _rows_of_differences(figures, is_relative),
        {family: {name: find(found) for name, find in DIFFERENCES.items()} for family, found in figures.items()},
        f"{'Per cent (positive is worse)' if is_relative else 'Points of accuracy (negative is worse)'}, model by "
        f"model: mean and standard deviation of the difference over seeds. {note.partition(';')[0]}.",
    )


if __name__ == "__main__":
    main()
