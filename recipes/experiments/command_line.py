"""The command line that all recipes share."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from .data import load_data
from .methods import METHODS
from .models import FAMILIES
from .report import table, write_report
from .runs import ResultsFile, RunSettings, execute_all
from .settings import ExperimentSettings, load_settings


def parser(description: str, config: str) -> argparse.ArgumentParser:
    """
    The options of a recipe.

    Args:
        description (`str`): First line of the help.
        config (`str`): Default of `--config`.
    """
    made = argparse.ArgumentParser(
        description=description.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--config", default=config, help="YAML file with the settings")
    made.add_argument("--scale", default="paper", help="paper, or a scale that the file defines, such as small")
    made.add_argument("--model", choices=list(FAMILIES), help="family; by default the file's")
    made.add_argument("--data-dir", help="folder with local files, instead of the Hub")
    made.add_argument("--data-files", nargs=2, metavar=("TRAIN", "TEST"), help="local files, instead of the Hub")
    made.add_argument("--set", nargs="+", default=[], metavar="SECTION.NAME=VALUE", help="any other setting")
    made.add_argument("--output-dir", type=Path, default=Path("recipe_output"), help="for results and models")
    return made


def add_method_options(made: argparse.ArgumentParser) -> None:
    """The options that say what is done to the model."""
    made.add_argument("--method", nargs="+", choices=list(METHODS), default=["compressm"])
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--final-state-size", type=int, help="of a layer, for every method but full")
    made.add_argument("--tolerance", type=float, help="share of the Hankel energy that a check may drop")
    made.add_argument("--strategy", choices=["tolerance", "fixed"], help="how a check finds the new size")
    made.add_argument("--keep-ratio", type=float, help="share of the states that a check of strategy fixed keeps")
    made.add_argument(
        "--selection-rule", choices=["largest", "smallest", "random"], help="ablation: only keep states, these"
    )


def settings_from(options: argparse.Namespace) -> ExperimentSettings:
    """The experiment that the options ask for."""
    overrides: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--set {text}: write SECTION.NAME=VALUE, for example training.max_steps=1000.")
        overrides[name] = yaml.safe_load(value)
    if options.model:
        overrides["model.name"] = options.model
    if options.data_dir:
        overrides["data.data_dir"] = options.data_dir
    if options.data_files:
        overrides["data.data_files"] = dict(zip(("train", "test"), options.data_files))
    for name in ("tolerance", "strategy", "keep_ratio", "selection_rule"):
        if getattr(options, name, None) is not None:
            overrides[f"compression.{name}"] = getattr(options, name)
    if getattr(options, "selection_rule", None) is not None:
        overrides["compression.reductor"] = "selection"
    return load_settings(options.config, options.scale, overrides)


def run_recipe(description: str, config: str, arguments: list[str] | None = None) -> None:
    """
    What every recipe's script does: train with the chosen methods and seeds, print one table.

    Args:
        description (`str`): The script's docstring.
        config (`str`): Its settings in `recipes/configs`.
        arguments (`list[str]`, *optional*): The command line; that of the process when unset.
    """
    made = parser(description, config)
    add_method_options(made)
    options = made.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = settings_from(options)
    state = PartialState()
    with state.main_process_first():
        data = load_data(settings.data)
    runs = [_run(settings, method, seed, options) for method in options.method for seed in options.seeds]
    folder = options.output_dir / f"{settings.recipe}-{options.scale}"
    results = execute_all(runs, data, folder, ResultsFile(folder / "results.jsonl"), state.is_main_process)
    if state.is_main_process:
        command = " ".join(["accelerate launch", f"recipes/{Path(sys.argv[0]).name}", *(arguments or sys.argv[1:])])
        page = write_report(results, folder / "report.md", f"{settings.recipe}, {settings.model['name']}", command)
        print(f"\n{table(results)}\n\n{page}")


def _run(settings: ExperimentSettings, method: str, seed: int, options: argparse.Namespace) -> RunSettings:
    size = None if method == "full" else options.final_state_size
    return RunSettings(settings, method, seed, size, {} if size is None else {"final_state_size": size})
