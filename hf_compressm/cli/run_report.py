"""A run's history and log as a table, a picture, and a page of HTML that stands by itself."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compression import HISTORY_NAME, CheckRecord
from ..compression.cards import Provenance, checks_table, describe_folder, layers_table
from ..errors import InconsistentModelError
from ..hub.loading import history_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """
    What a run left behind.

    Args:
        name (`str`): The folder's name.
        provenance ([`~compression.cards.Provenance`]): Records and settings.
        log (`list[dict]`): The Trainer's log history; empty where no checkpoint holds one.
    """

    name: str
    provenance: Provenance
    log: list[dict[str, Any]]

    @property
    def records(self) -> list[CheckRecord]:
        """Every check."""
        return list(self.provenance.records)


def read_run(folder: Path) -> Run:
    """
    Read the history in a folder, and the Trainer's log from the folder or its latest checkpoint.

    Args:
        folder (`Path`): The Trainer's output folder, or a compressed model's.

    Raises:
        [`~errors.InconsistentModelError`]: there is no history, or it cannot be read.
    """
    if not (folder / HISTORY_NAME).is_file():
        raise InconsistentModelError(
            f"{folder} has no {HISTORY_NAME}; give the output folder of a run with CompreSSMCallback, or one that "
            "`hf-compressm compress` wrote."
        )
    provenance = Provenance(history_of(folder))
    if not provenance.layers():
        raise InconsistentModelError(f"no check in {folder / HISTORY_NAME} has seen a layer; there is nothing to show.")
    if (folder / "config.json").is_file():
        provenance = describe_folder(folder, provenance)
    return Run(folder.resolve().name, provenance, _log(folder))


def run_table(run: Run) -> str:
    """The checks and the layers, for a terminal."""
    return f"{checks_table(run.records)}\n\n{layers_table(run.provenance, mark=str)}"


def draw_run(run: Run) -> bytes:
    """
    One picture: the spectra before the first cut, the state sizes and the loss over the steps. A PNG file.

    Args:
        run ([`Run`]): The run.
    """
    from matplotlib.figure import Figure

    has_log = any("loss" in entry for entry in run.log)
    steps = [record.step for record in run.records if record.step is not None]
    panels = [_draw_spectra, *([_draw_sizes] if steps else []), *([_draw_loss] if has_log else [])]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, run)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def render_page(run: Run, picture: bytes) -> str:
    """
    The page: style, picture and tables in one file. Everything that comes from the run is escaped.

    Args:
        run ([`Run`]): The run.
        picture (`bytes`): From [`draw_run`].
    """
    import jinja2

    template = (resources.files(__package__) / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        run=run,
        layers=run.provenance.layers(),
        cuts=run.provenance.cuts,
        config=run.provenance.config.to_dict() if run.provenance.config else {},
        picture=base64.b64encode(picture).decode(),
    )


def _draw_spectra(axes: Axes, run: Run) -> None:
    seen = [record for record in run.records if record.layers and record.outcome != "rolled_back"]
    record = run.provenance.cuts[0] if run.provenance.cuts else seen[-1]
    for number, layer in enumerate(record.layers):
        sigma = layer.hankel_singular_values
        largest = max(sigma, default=1.0) or 1.0
        values = [max(value / largest, 1e-9) for value in sigma]
        colour = _colour(number, len(record.layers))
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=".", linewidth=1)
    kept = max(layer.size_after for layer in record.layers)
    axes.axvline(kept + 0.5, color="black", linestyle="--", linewidth=1, label=f"{kept} states kept")
    axes.set(yscale="log", xlabel="state", ylabel="Hankel singular value / largest", title="Before the first cut")
    axes.legend(frameon=False, fontsize="small")


def _draw_sizes(axes: Axes, run: Run) -> None:
    records = [record for record in run.records if record.layers and record.step is not None]
    # A little beyond the last check, so that its cut can be seen where no log tells how long the run was.
    last = max([1.1 * records[-1].step, *(entry.get("step", 0) for entry in run.log)])
    courses: dict[tuple, list[str]] = {}
    for _, layer in run.provenance.layers():
        points = [(r.step, seen) for r in records for seen in r.layers if seen.name == layer.name]
        steps = (0, *(step for step, _ in points), last)
        sizes = (points[0][1].size_before, *(seen.size_after for _, seen in points), points[-1][1].size_after)
        courses.setdefault((steps, sizes), []).append(layer.name)
    for number, ((steps, sizes), names) in enumerate(courses.items()):
        label = names[0] if len(names) == 1 else f"{len(names)} layers"
        axes.step(steps, sizes, where="post", color=_colour(number, len(courses)), linewidth=1.5, label=label)
    if len(courses) <= 8:
        axes.legend(frameon=False, fontsize="small")
    axes.set(xlabel="training step", ylabel="state size", title="State size", ylim=(0, None))


def _draw_loss(axes: Axes, run: Run) -> None:
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in run.log if name in entry and "step" in entry]
        if points:
            axes.plot(*zip(*points), label=label, marker=".", linewidth=1)
    for record in run.provenance.cuts:
        if record.step is not None:
            axes.axvline(record.step, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="training step", ylabel="loss", title="Loss (dashed: a cut)")
    axes.legend(frameon=False, fontsize="small")


def _colour(number: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number) if count <= 10 else colormaps["viridis"](number / (count - 1))


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log history of the folder or of its latest checkpoint; figures only."""
    checkpoints = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    places = [folder, *(path for _, path in sorted(checkpoints, reverse=True))]
    for place in places:
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
