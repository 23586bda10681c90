"""Grids: a YAML file that lists runs, products of settings included."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .runs import RunSettings
from .settings import ExperimentSettings, load_settings

GRIDS = Path(__file__).parents[1] / "grids"


@dataclass(frozen=True)
class Grid:
    """
    Runs on one experiment.

    Args:
        name (`str`): Names the results.
        title (`str`): Heading of the table.
        config (`str`): The experiment's file.
        scale (`str`): Its scale.
        seeds (`list[int]`): Every run is made with each of them.
        runs (`list[dict]`): Each has `method` and any of `final_state_size` and dotted settings. A list stands for as
            many runs, and several lists for all combinations; a setting that is a list itself, such as a window, is
            written as a list of lists.
        settings (`dict`, *optional*): Dotted settings of all runs.
        panels (`list[dict]`, *optional*): See [`report.picture`].
        timed (`bool`, *optional*, defaults to `True`): Whether the table has times, for which the machine must have
            nothing else to do.
        by_convolution (`bool`, *optional*, defaults to `False`): Whether LRU layers are computed by convolution, which
            gives the same figures up to rounding, sooner where layers are narrow and sequences long, and times that
            do not depend on the state size.

    Raises:
        `ValueError`: `timed` with `by_convolution`, whose times are not those of the library.
    """

    name: str
    title: str
    config: str
    scale: str
    seeds: list[int]
    runs: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    panels: list[dict[str, Any]] = field(default_factory=list)
    timed: bool = True
    by_convolution: bool = False

    def __post_init__(self) -> None:
        if self.timed and self.by_convolution:
            raise ValueError(f"the grid {self.name} is by_convolution, whose times say nothing; set timed: false.")

    @classmethod
    def from_file(cls, path: str | Path) -> Grid:
        """Read a grid's YAML file, or the one of that name in `recipes/grids`."""
        path = Path(path) if Path(path).exists() else GRIDS / Path(path).name
        if not path.exists():
            known = ", ".join(sorted(file.name for file in GRIDS.glob("*.yaml")))
            raise FileNotFoundError(f"there is no grid {path}; recipes/grids has {known}.")
        return cls(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))

    def experiment(self, overrides: dict[str, Any] | None = None) -> ExperimentSettings:
        """The experiment with the grid's settings and further ones."""
        return load_settings(self.config, self.scale, {**self.settings, **(overrides or {})})

    def expand(self, overrides: dict[str, Any] | None = None) -> list[RunSettings]:
        """
        Every run of the grid, the seeds outermost, so that an interrupted grid has all rows with fewer seeds.

        Args:
            overrides (`dict`, *optional*): Dotted settings that win over the grid's, such as where the data are.

        Raises:
            `ValueError`: the runs are not all on the same data.
        """
        combinations = [combination for entry in self.runs for combination in _product(entry)]
        expanded = []
        for seed, entry in itertools.product(self.seeds, combinations):
            varied = {name: value for name, value in entry.items() if name != "method"}
            changes = {name: value for name, value in varied.items() if name != "final_state_size"}
            experiment = self.experiment({**changes, **(overrides or {})})
            size = varied.get("final_state_size")
            expanded.append(RunSettings(experiment, entry["method"], seed, size, varied))
        if len({run.experiment.fingerprint("data") for run in expanded}) > 1:
            raise ValueError(f"the runs of the grid {self.name} differ in their data; make a grid of each.")
        return expanded


def _product(entry: dict[str, Any]) -> list[dict[str, Any]]:
    choices = [value if isinstance(value, list) else [value] for value in entry.values()]
    return [dict(zip(entry, combination)) for combination in itertools.product(*choices)]
