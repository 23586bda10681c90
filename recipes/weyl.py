"""
Weyl's theorem in practice: how far Hankel singular values move in training, and when their order settles.

    python recipes/weyl.py --config recipes/configs/sfashion.yaml --scale small [--checks 25] [--seeds 0 1 2]

Nothing is cut. At each check the recipe notes every layer's system. Between two checks no Hankel singular value can
move further than the Hankel norm of the difference of the two systems (Weyl's theorem for the Hankel operators; Chahine
et al., 2026, arXiv 2510.02823, base their early cut on it); the figure shows the largest move beside that bound, how
far the spectrum is from its final one, and the rank correlation of the states' scores with the final ones.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from experiments.command_line import parser, settings_from
from experiments.data import load_data
from experiments.layer_systems import layer_systems
from experiments.methods import Run
from torch import Tensor
from transformers import TrainerCallback

from hf_compressm.systems import DiagonalLTI, diagonal_hankel_scores, energy_rank, rank_correlation


class SystemRecorder(TrainerCallback):
    """
    Keeps every layer's system at the start and after evenly spaced steps.

    Args:
        steps (`set[int]`): The steps; 0 is before the first.
    """

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.snapshots: list[tuple[int, dict[str, DiagonalLTI]]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._note(0, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self._note(state.global_step, model)

    @torch.no_grad()
    def _note(self, step: int, model: torch.nn.Module) -> None:
        if step in self.steps:
            systems = layer_systems(model).items()
            self.snapshots.append((step, {name: DiagonalLTI(s.lam.cpu(), s.B.cpu(), s.C.cpu()) for name, s in systems}))


def difference(first: DiagonalLTI, second: DiagonalLTI) -> DiagonalLTI:
    """The system whose output is the difference of two systems' outputs to the same input."""
    return DiagonalLTI(
        torch.cat([first.lam, second.lam], dim=-1),
        torch.cat([first.B, second.B], dim=-2),
        torch.cat([first.C, -second.C], dim=-1),
    )


def state_scores(system: DiagonalLTI) -> Tensor:
    """What each state is worth in the layer's own coordinates, all systems of the layer in one row."""
    return diagonal_hankel_scores(system.controllability_gramian(), system.observability_gramian()).flatten()


def drift(snapshots: list[tuple[int, dict[str, DiagonalLTI]]], tolerance: float) -> list[dict[str, Any]]:
    """
    One row a layer and check.

    Args:
        snapshots (`list`): Steps and systems, from the first to the last.
        tolerance (`float`): For the rank that a cut would choose.

    Returns:
        `list[dict]`: `layer`, `step`, `move` (largest change of a Hankel singular value since the check before) and
        `bound` on it, both relative to the largest value then; `distance` (relative, of the spectrum to the final
        one), `correlation` (Spearman, of the states' scores with the final ones), `rank`.
    """
    rows = []
    for name in snapshots[0][1]:
        last = snapshots[-1][1][name]
        final_sigma, final_scores = last.hankel_singular_values(), state_scores(last)
        previous: DiagonalLTI | None = None
        for step, systems in snapshots:
            system = systems[name]
            sigma = system.hankel_singular_values()
            row = {
                "layer": name,
                "step": step,
                "distance": float((sigma - final_sigma).norm() / final_sigma.norm()),
                "correlation": float(rank_correlation(state_scores(system), final_scores)),
                "rank": float(torch.as_tensor(energy_rank(sigma, tolerance)).double().mean()),
            }
            if previous is not None:
                before = previous.hankel_singular_values()
                largest = float(before.max())
                row["move"] = float((sigma - before).abs().max()) / largest
                row["bound"] = float(difference(system, previous).hankel_singular_values().max()) / largest
            previous = system
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path, tolerance: float) -> None:
    """
    Four panels over the training steps, one line a seed and layer.

    Args:
        rows (`list[dict]`): Of [`drift`], with the `seed` added.
        path (`Path`): Where to write the picture.
        tolerance (`float`): For the label.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = dict(zip(("move", "distance", "correlation", "rank"), figure.subplots(2, 2).flat))
    groups = list(dict.fromkeys((row["seed"], row["layer"]) for row in rows))
    for number, group in enumerate(groups):
        own = [row for row in rows if (row["seed"], row["layer"]) == group]
        colour = colormaps["tab10"](number % 10)
        for name, axis in panels.items():
            known = [row for row in own if name in row]
            label = f"seed {group[0]}, {group[1]}" if len(groups) <= 10 else None
            axis.plot([r["step"] for r in known], [r[name] for r in known], color=colour, marker=".", label=label)
            if name == "move":
                bounds = [r["bound"] for r in known]
                axis.plot([r["step"] for r in known], bounds, color=colour, linestyle=":")
    for axis, label in zip(
        panels.values(),
        (
            "largest move of an HSV / largest HSV\n(dotted: Weyl's bound)",
            "distance of the spectrum to the final one",
            "rank correlation with the final order",
            f"states for {1 - tolerance:g} of the energy",
        ),
    ):
        axis.set(xlabel="training step", ylabel=label)
        axis.grid(alpha=0.3)
    panels["move"].set_yscale("log")
    panels["distance"].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Train, note, draw."""
    made = parser(__doc__, "sfashion.yaml")
    made.add_argument("--checks", type=int, default=25, help="evenly spaced over the training")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--tolerance", type=float, default=0.01, help="for the rank in the picture")
    options = made.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tolerance, options.tolerance = options.tolerance, None
    settings = settings_from(options)
    data = load_data(settings.data)
    total = settings.training.max_steps
    steps = {round(total * part / options.checks) for part in range(options.checks + 1)}
    rows = []
    for seed in options.seeds:
        run = Run(settings, data, "full", seed, options.output_dir / "weyl")
        recorder = SystemRecorder(steps)
        run.train(run.build(settings.state_size), callbacks=[recorder])
        rows += [{"seed": seed, **row} for row in drift(recorder.snapshots, tolerance)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "weyl.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, options.output_dir / "weyl.png", tolerance)
    violated = [row for row in rows if row.get("move", 0.0) > row.get("bound", 0.0) * (1 + 1e-6) + 1e-12]
    settled = {}
    for row in rows:
        if row["correlation"] < 0.9:
            settled[row["seed"], row["layer"]] = row["step"]
    for (seed, layer), step in settled.items():
        print(f"seed {seed}, {layer}: rank correlation with the final order below 0.9 up to step {step} of {total}")
    print(f"{len(violated)} of {len(rows)} moves beyond Weyl's bound; {options.output_dir / 'weyl.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
