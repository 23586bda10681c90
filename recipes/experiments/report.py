"""Results as a Markdown table and as a picture: mean and standard deviation over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .runs import RunResult

METHOD_NAMES = {
    "full": "full size",
    "compressm": "CompreSSM in training",
    "scratch": "small from scratch",
    "post_training": "cut after training",
    "distillation": "distillation",
    "hankel_regularization": "Hankel regularisation, then cut",
}


@dataclass(frozen=True)
class Row:
    """
    Runs that differ in nothing but the seed.

    Args:
        results (`tuple[RunResult, ...]`): The runs.
    """

    results: tuple[RunResult, ...]

    @property
    def method(self) -> str:
        """Their method."""
        return self.results[0].method

    @property
    def varied(self) -> dict[str, Any]:
        """What tells them from other rows of the same method."""
        return self.results[0].varied

    def mean(self, name: str) -> float:
        """Mean of a field of the results."""
        return statistics.mean(getattr(result, name) for result in self.results)

    def deviation(self, name: str) -> float:
        """Sample standard deviation of a field; 0 for one seed."""
        values = [getattr(result, name) for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def rows(results: Sequence[RunResult]) -> list[Row]:
    """The results grouped over seeds, in the order in which they first appear."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(json.dumps([result.method, result.varied], sort_keys=True), []).append(result)
    return [Row(tuple(group)) for group in groups.values()]


def table(results: Sequence[RunResult], timed: bool = True) -> str:
    """
    A Markdown table: one row a method and setting, mean +- standard deviation over seeds.

    Args:
        results (`Sequence[RunResult]`): Of one experiment.
        timed (`bool`, *optional*, defaults to `True`): Whether their times are shown; not where other work shared the
            machine.
    """
    grouped = rows(results)
    names = list(dict.fromkeys(name for row in grouped for name in row.varied))
    base = next((row for row in grouped if row.method == "full"), None)
    header = ["method", *(_short(name) for name in names if name != "final_state_size"), "final state size"]
    header += ["accuracy", *(["training time", "processor time", "against full size", "extra"] if timed else [])]
    cells = [
        [
            METHOD_NAMES[row.method],
            *(_shown(row.varied.get(name)) for name in names if name != "final_state_size"),
            _size(row),
            f"{row.mean('accuracy'):.4f} +- {row.deviation('accuracy'):.4f}",
            *(_times(row, base) if timed else []),
        ]
        for row in grouped
    ]
    return tabulate(cells, headers=header, tablefmt="github", disable_numparse=True)


def _times(row: Row, base: Row | None) -> list[str]:
    return [
        f"{row.mean('seconds'):.1f} +- {row.deviation('seconds'):.1f} s",
        f"{row.mean('cpu_seconds'):.1f} s",
        f"{row.mean('cpu_seconds') / base.mean('cpu_seconds'):.2f}" if base else "",
        f"{row.mean('extra_seconds'):.2f} s" if row.mean("extra_seconds") else "",
    ]


TABLE_NOTE = "Accuracy on the test set, mean and sample standard deviation over seeds {seeds}."
TIMES_NOTE = (
    " The training time holds "
    "everything that a method trains and cuts, a teacher's training included, and not the test; the processor time is "
    "that of the same work on all cores, and the ratio to the full size is one of processor times. Extra is the part "
    "that is the method's own: cuts, penalties, the teacher."
)


def write_report(
    results: Sequence[RunResult],
    path: str | Path,
    title: str,
    command: str,
    panels: Sequence[dict[str, Any]] = (),
    timed: bool = True,
) -> Path:
    """
    Write a page with the table, and its picture beside it.

    Args:
        results (`Sequence[RunResult]`): Of one experiment.
        path (`str` or `Path`): The Markdown file; the picture has the same name and ends in `.png`.
        title (`str`): The heading.
        command (`str`): The command that made the results.
        panels (`Sequence[dict]`, *optional*): See [`picture`].
        timed (`bool`, *optional*, defaults to `True`): See [`table`].
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = path.with_suffix(".png")
    picture(results, image, panels or DEFAULT_PANELS)
    seeds = sorted({result.seed for result in results})
    machines = sorted({result.machine for result in results})
    path.write_text(
        f"# {title}\n\n{table(results, timed)}\n\n"
        f"{TABLE_NOTE.format(seeds=', '.join(map(str, seeds)))}{TIMES_NOTE if timed else ''}\n\n"
        f"![{title}]({image.name})\n\nMade by `{command}`; {'; '.join(machines)}.\n",
        encoding="utf-8",
    )
    return path


DEFAULT_PANELS = ({"x": "final_state_size", "log": True}, {"x": "cpu_seconds"})

FIELDS = ("final_state_size", "cpu_seconds", "seconds")
LABELS = {
    "final_state_size": "final state size, sum over layers",
    "cpu_seconds": "training, seconds of processor time",
    "seconds": "training, seconds",
    "compression.window": "last cut, share of the training",
}


def picture(results: Sequence[RunResult], path: str | Path, panels: Sequence[dict[str, Any]] = DEFAULT_PANELS) -> None:
    """
    Draw the accuracy against something else, one panel each.

    Args:
        results (`Sequence[RunResult]`): Of one experiment.
        path (`str` or `Path`): Where to write; the ending names the format.
        panels (`Sequence[dict]`, *optional*): Each with `x`, a field of [`RunResult`] or a dotted name of what is
            varied, and optionally `log` (a logarithmic axis that names every value on it), `title`, and `where`, the
            values that `varied` must have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours: dict[str, Any] = {}
    for axis, panel in zip(axes, panels):
        _draw(axis, rows(results), panel, colours)
    axes[0].set_ylabel("test accuracy")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    columns = 3 if max(map(len, handles)) < 32 else 2
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axis: Any, grouped: list[Row], panel: dict[str, Any], colours: dict[str, Any]) -> None:
    from matplotlib import colormaps

    name = panel["x"]
    series: dict[str, list[tuple[float, Row]]] = {}
    for row in grouped:
        is_varied = name not in FIELDS
        if is_varied and name not in row.varied:
            _reference_line(axis, row, colours)
            continue
        if any(row.varied.get(key) != value for key, value in panel.get("where", {}).items()):
            continue
        others = {k: v for k, v in row.varied.items() if k not in ("final_state_size", name, *panel.get("where", {}))}
        label = ", ".join([METHOD_NAMES[row.method], *(f"{_short(k)} {_shown(v)}" for k, v in others.items())])
        series.setdefault(label, []).append((_number(row.varied[name]) if is_varied else row.mean(name), row))
    for label, points in series.items():
        points.sort(key=lambda point: point[0])
        colour = colours.setdefault(label, colormaps["tab10"](len(colours) % 10))
        axis.errorbar(
            [x for x, _ in points],
            [row.mean("accuracy") for _, row in points],
            [row.deviation("accuracy") for _, row in points],
            label=label,
            color=colour,
            marker="o",
            capsize=3,
        )
    if panel.get("log"):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({x for points in series.values() for x, _ in points}))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=LABELS.get(name, _short(name)), title=panel.get("title", ""))
    axis.grid(alpha=0.3)


def _reference_line(axis: Any, row: Row, colours: dict[str, Any]) -> None:
    """A method that does not know what the axis varies, as a level line with its deviation."""
    from matplotlib import colormaps

    label = METHOD_NAMES[row.method]
    colour = colours.setdefault(label, colormaps["tab10"](len(colours) % 10))
    mean, deviation = row.mean("accuracy"), row.deviation("accuracy")
    axis.axhline(mean, color=colour, linestyle="--", label=label)
    axis.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.12)


def _number(value: Any) -> float:
    """A place on an axis; a window stands at its end."""
    return float(value[-1] if isinstance(value, (list, tuple)) else value)


def _short(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return " to ".join(f"{edge:g}" for edge in value) if isinstance(value, (list, tuple)) else str(value)


def _size(row: Row) -> str:
    sizes = sorted({result.final_state_size for result in row.results})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
