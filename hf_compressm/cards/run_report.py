"""What a training run under compression left behind: a table, and a picture of spectra, state sizes and losses."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compression.history import HISTORY_NAME, CheckRecord, history_of
from ..compression.spectrum import MOST_LEGEND_ENTRIES, layer_colours
from ..errors import InconsistentModelError
from ..files import checkpoints_in
from .provenance import Provenance, describe_folder
from .section import checks_table, layers_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATE_NAME = "trainer_state.json"


@dataclass(frozen=True)
class RunReport:
    """
    A run's records and log, for a person.

    Args:
        name (`str`): The run's name.
        provenance ([`~cards.Provenance`]): Records and settings.
        log (`list[dict]`, *optional*): The Trainer's log history, for the losses; empty where none is known.

    Example:

    ```python
    report = RunReport.from_folder("run")     # or RunReport.of(callback, trainer)
    print(report.table())
    report.plot("run.png")
    ```
    """

    name: str
    provenance: Provenance
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> RunReport:
        """
        Read the history in a folder, and the Trainer's log from the folder or its latest checkpoint.

        Args:
            folder (`str` or `os.PathLike`): The Trainer's output folder, or a compressed model's.

        Raises:
            [`~errors.InconsistentModelError`]: there is no history, or it cannot be read.
        """
        folder = Path(folder)
        if not (folder / HISTORY_NAME).is_file():
            raise InconsistentModelError(
                f"{folder} has no {HISTORY_NAME}; give the output folder of a run with CompreSSMCallback, or one that "
                "`hf-compressm compress` wrote."
            )
        provenance = Provenance(history_of(folder))
        if not provenance.layers():
            raise InconsistentModelError(
                f"no check in {folder / HISTORY_NAME} has seen a layer; there is nothing to show."
            )
        if (folder / "config.json").is_file():
            provenance = describe_folder(folder, provenance)
        return cls(folder.resolve().name, provenance, _log(folder))

    @classmethod
    def of(cls, callback: Any, trainer: Any) -> RunReport:
        """
        The report of a training that has just ended, or is under way.

        Args:
            callback ([`CompreSSMCallback`]): Its records and settings are shown.
            trainer (`transformers.Trainer`): Its log history is shown.
        """
        name = Path(trainer.args.output_dir).resolve().name
        return cls(name, Provenance(callback.records, config=callback.config), list(trainer.state.log_history))

    @property
    def records(self) -> list[CheckRecord]:
        """Every check."""
        return list(self.provenance.records)

    def table(self) -> str:
        """The checks and the layers, for a terminal."""
        return f"{checks_table(self.records)}\n\n{layers_table(self.provenance, mark=str)}"

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """
        Draw the spectra before the first cut and at the last check, and the state sizes and the loss over the steps.

        Args:
            path (`str` or `os.PathLike`, *optional*): Where to write the picture; the ending names the format.

        Returns:
            `matplotlib.figure.Figure`: The figure, for further use.
        """
        from matplotlib.figure import Figure

        has_log = any("loss" in entry for entry in self.log)
        steps = [record.step for record in self.records if record.step is not None]
        panels = [_draw_spectra, *([_draw_sizes] if steps else []), *([_draw_loss] if has_log else [])]
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            draw(axes, self)
            axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _draw_spectra(axes: Axes, run: RunReport) -> None:
    seen = [record for record in run.records if record.layers and record.outcome != "rolled_back"]
    if not seen:
        axes.set(title="No spectrum was recorded")
        return
    record = run.provenance.cuts[0] if run.provenance.cuts else seen[-1]
    last = seen[-1]
    for shown, style in ((record, "-"), *(((last, ":"),) if last is not record else ())):
        for layer, colour in zip(shown.layers, layer_colours(len(shown.layers))):
            sigma = layer.hankel_singular_values
            largest = max(sigma, default=1.0) or 1.0
            values = [max(value / largest, 1e-9) for value in sigma]
            named = shown is record and len(record.layers) <= MOST_LEGEND_ENTRIES
            label = (layer.name or "(model)") if named else None
            axes.plot(range(1, len(values) + 1), values, style, color=colour, marker=".", linewidth=1, label=label)
    kept = max(layer.size_after for layer in record.layers)
    axes.axvline(kept + 0.5, color="black", linestyle="--", linewidth=1, label=f"{kept} states kept")
    axes.set(
        yscale="log",
        xlabel="state",
        ylabel="Hankel singular value / largest",
        title="Before the first cut" if last is record else "Before the first cut (dotted: last check)",
    )
    axes.legend(frameon=False, fontsize="small")


def _draw_sizes(axes: Axes, run: RunReport) -> None:
    records = [record for record in run.records if record.layers and record.step is not None]
    # A little beyond the last check, so that its cut can be seen where no log says how long the run was.
    last = max([1.1 * records[-1].step, *(entry.get("step", 0) for entry in run.log)])
    courses: dict[tuple, list[str]] = {}
    for _, layer in run.provenance.layers():
        points = [(r.step, seen) for r in records for seen in r.layers if seen.name == layer.name]
        steps = (0, *(step for step, _ in points), last)
        sizes = (points[0][1].size_before, *(seen.size_after for _, seen in points), points[-1][1].size_after)
        courses.setdefault((steps, sizes), []).append(layer.name)
    for ((steps, sizes), names), colour in zip(courses.items(), layer_colours(len(courses))):
        label = names[0] if len(names) == 1 else f"{len(names)} layers"
        axes.step(steps, sizes, where="post", color=colour, linewidth=1.5, label=label)
    if len(courses) <= MOST_LEGEND_ENTRIES:
        axes.legend(frameon=False, fontsize="small")
    axes.set(xlabel="training step", ylabel="state size", title="State size", ylim=(0, None))


def _draw_loss(axes: Axes, run: RunReport) -> None:
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in run.log if name in entry and "step" in entry]
        if points:
            axes.plot(*zip(*points), label=label, marker=".", linewidth=1)
    for record in run.provenance.cuts:
        if record.step is not None:
            axes.axvline(record.step, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="training step", ylabel="loss", title="Loss (dashed: a cut)")
    axes.legend(frameon=False, fontsize="small")


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log history of the folder or of its latest checkpoint; figures only."""
    for place in (folder, *reversed(checkpoints_in(folder))):
        path = place / _STATE_NAME
        if not path.is_file():
            continue
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            return [
                {name: value for name, value in entry.items() if isinstance(value, (int, float))} for entry in entries
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InconsistentModelError(f"{path} is not the state of a Trainer: {error!r}.") from error
    return []
