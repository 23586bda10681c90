"""One run from its settings to its result, and the file of results that makes a grid of runs resumable."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_compressm import fast_cpu_scan

from .data import SequenceData
from .methods import METHODS, SECTIONS, Run
from .models import state_sizes
from .settings import ExperimentSettings, fingerprint
from .training import test_accuracy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """
    Everything that decides what a run computes.

    Args:
        experiment ([`ExperimentSettings`]): Data, model, training.
        method (`str`): A name in [`METHODS`].
        seed (`int`): Of weights, data order and dropout.
        final_state_size (`int`, *optional*): See [`Run`].
        varied (`dict`, *optional*): What a table shows to tell this run from others, by dotted names.
    """

    experiment: ExperimentSettings
    method: str
    seed: int
    final_state_size: int | None = None
    varied: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}; choose one of {', '.join(METHODS)}.")

    @property
    def key(self) -> str:
        """Changes with anything that decides the result."""
        experiment = self.experiment.fingerprint(*SECTIONS[self.method])
        return fingerprint([experiment, self.method, self.seed, self.final_state_size])


@dataclass(frozen=True)
class RunResult:
    """
    What a run gave; one line of a results file.

    Args:
        key (`str`): Of the run's settings.
        recipe (`str`): Name of the experiment.
        model (`str`): Name of the family.
        method (`str`): Name of the method.
        seed (`int`): The seed.
        varied (`dict`): What tells this run from others of its grid.
        accuracy (`float`): On the test set, between 0 and 1.
        initial_state_size (`int`): Sum over layers at the start of the training.
        final_state_size (`int`): Sum over layers at its end.
        parameters (`int`): Of the final model.
        steps (`int`): Optimizer steps of one training.
        seconds (`float`): Wall-clock time of everything that the method trains and cuts, a teacher included.
        cpu_seconds (`float`): The same by this process's processor time.
        extra_seconds (`float`): The part that is the method's own: cuts, penalties, a teacher's training.
        machine (`str`): Processor or GPU, threads, versions.
    """

    key: str
    recipe: str
    model: str
    method: str
    seed: int
    varied: dict[str, Any]
    accuracy: float
    initial_state_size: int
    final_state_size: int
    parameters: int
    steps: int
    seconds: float
    cpu_seconds: float
    extra_seconds: float
    machine: str


def execute(settings: RunSettings, data: SequenceData, output_dir: str | Path) -> RunResult:
    """
    Train, cut and test as the settings say.

    Args:
        settings ([`RunSettings`]): The run.
        data ([`SequenceData`]): The experiment's data.
        output_dir (`str` or `Path`): Gets a folder for the run, and one for models that several runs begin with.
    """
    experiment = settings.experiment
    folder = Path(output_dir) / f"{settings.method}-{settings.key}"
    run = Run(experiment, data, settings.method, settings.seed, folder, settings.final_state_size)
    # For every method, so that none of them is compared on a slower scan.
    with fast_cpu_scan():
        outcome = METHODS[settings.method](run)
        accuracy = test_accuracy(outcome.model, data, experiment.training, folder)
    sizes = state_sizes(outcome.model)
    cut = settings.method not in ("scratch", "distillation")
    return RunResult(
        key=settings.key,
        recipe=experiment.recipe,
        model=experiment.model["name"],
        method=settings.method,
        seed=settings.seed,
        varied=settings.varied,
        accuracy=accuracy,
        initial_state_size=experiment.state_size * len(sizes) if cut else sum(sizes),
        final_state_size=sum(sizes),
        parameters=outcome.model.num_parameters(),
        steps=experiment.training.max_steps,
        seconds=outcome.cost.seconds,
        cpu_seconds=outcome.cost.cpu_seconds,
        extra_seconds=outcome.extra.seconds,
        machine=machine(),
    )


def machine() -> str:
    """The processor or GPU, the threads and the versions behind a figure."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{name}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class ResultsFile:
    """
    Finished runs, one JSON object a line; each is written as soon as its run is finished.

    Args:
        path (`str` or `Path`): The file; it is made with the first result.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[RunResult]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                yield RunResult(**json.loads(line))
            except json.JSONDecodeError:
                # A run that was killed while it wrote; the run is repeated.
                logger.warning("line %d of %s is incomplete and is left out", number, self.path)

    def append(self, result: RunResult) -> None:
        """Add a line and make sure that it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if text and not text.endswith("\n") else "") + json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def execute_all(
    runs: list[RunSettings], data: SequenceData, output_dir: str | Path, results: ResultsFile, main_process: bool = True
) -> list[RunResult]:
    """
    Execute the runs that the results file does not hold yet.

    Args:
        runs (`list[RunSettings]`): The runs; all are on the same data.
        data ([`SequenceData`]): Their data.
        output_dir (`str` or `Path`): See [`execute`].
        results ([`ResultsFile`]): Grows by one line a run.
        main_process (`bool`, *optional*, defaults to `True`): Whether this process writes.

    Returns:
        `list[RunResult]`: Of all runs, in their order, whether they were executed now or before.
    """
    found = {result.key: result for result in results}
    for number, settings in enumerate(runs, start=1):
        if settings.key not in found:
            result = execute(settings, data, output_dir)
            found[settings.key] = result
            if main_process:
                results.append(result)
        if main_process:
            result = found[settings.key]
            print(
                f"[{number}/{len(runs)}] {result.method} {_words(settings.varied)}seed {result.seed}: accuracy "
                f"{result.accuracy:.4f}, state {result.initial_state_size} -> {result.final_state_size}, "
                f"{result.seconds:.1f} s ({result.cpu_seconds:.1f} s of processor time)",
                flush=True,
            )
    # What is varied only names a row, so it follows the present grid rather than the one that ran first.
    return [replace(found[settings.key], varied=settings.varied) for settings in runs]


def _words(varied: dict[str, Any]) -> str:
    return "".join(f"{name.rpartition('.')[2]}={value} " for name, value in varied.items())
