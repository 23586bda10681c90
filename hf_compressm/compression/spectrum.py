"""Spectra for a person: a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate
from torch import Tensor

from ..systems import energy_rank
from .history import CheckRecord
from .size_table import SizeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TABLE_ENERGIES = (0.9, 0.95, 0.99, 0.999)
# More layers than this are distinguished by a colour scale instead of a legend.
MOST_LEGEND_ENTRIES = 8


@dataclass(frozen=True)
class Spectrum:
    """
    The Hankel singular values of every layer of a model.

    Args:
        sigma (`Mapping[str, torch.Tensor]`): For each layer's name its Hankel singular values, `(N,)` float64,
            descending. Their scale differs from layer to layer; only ratios within a layer carry meaning.
        loss (`float`, *optional*): Mean loss of the calibration batches.
        sizes (`Sequence[SizeRow]`, *optional*): What the model would be at several state sizes, the present one first.
    """

    sigma: Mapping[str, Tensor]
    loss: float | None = None
    sizes: Sequence[SizeRow] = ()

    @classmethod
    def from_record(cls, record: CheckRecord) -> Spectrum:
        """The spectra that a check saw, before its cut."""
        sigma = {layer.name: torch.tensor(layer.hankel_singular_values, dtype=torch.float64) for layer in record.layers}
        return cls(sigma, record.loss_before)

    def ranks(self, tolerance: float) -> dict[str, int]:
        """
        The state size of each layer that drops at most a share `tolerance` of its Hankel energy.

        Args:
            tolerance (`float`): Strictly between 0 and 1.

        Raises:
            [`~errors.ConfigurationError`]: the tolerance is not allowed.
        """
        return {name: int(energy_rank(sigma, tolerance)) for name, sigma in self.sigma.items()}

    def table(self, energies: Sequence[float] = _TABLE_ENERGIES) -> str:
        """
        The effective ranks as a Markdown table, one row a layer.

        Args:
            energies (`Sequence[float]`, *optional*): Shares of the Hankel energy to keep, one column each.
        """
        ranks = [self.ranks(1 - energy) for energy in energies]
        header = ["layer", "state size", *(f"{energy:.4g} of the energy" for energy in energies)]
        rows = [
            [name or "(model)", str(len(sigma)), *(str(column[name]) for column in ranks)]
            for name, sigma in self.sigma.items()
        ]
        return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)

    def size_table(self) -> str:
        """What the model would be at several state sizes, as a Markdown table: the loss says what a cut costs."""
        header = ["state size", "loss", "change", "parameters", "state bytes", "step, ms"]
        first = self.sizes[0].loss if self.sizes else None
        rows = []
        for row in self.sizes:
            known = row.loss is not None and bool(first)
            rows.append(
                [
                    str(row.state_size),
                    "cannot be made" if row.loss is None else f"{row.loss:.4f}",
                    f"{row.loss / first - 1:+.2%}" if known else "",
                    f"{row.parameters:,}",
                    "" if row.state_bytes is None else f"{row.state_bytes:,}",
                    "" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f}",
                ]
            )
        return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)

    def plot(self, path: str | os.PathLike | None = None, tolerance: float | None = None) -> Figure:
        """
        Draw the spectra: each layer's singular values, and the share of energy beyond each state; then, where sizes
        were measured, the loss at each.

        Args:
            path (`str` or `os.PathLike`, *optional*): Where to write the picture; the ending names the format.
            tolerance (`float`, *optional*): Draws this share of energy as a line.

        Returns:
            `matplotlib.figure.Figure`: The figure, for further use.
        """
        from matplotlib.figure import Figure

        panels = 3 if self.sizes else 2
        figure = Figure(figsize=(5 * panels, 3.8), layout="constrained")
        values, energy, *losses = figure.subplots(1, panels)
        for axes in losses:
            _draw_losses(axes, self.sizes)
        colours = layer_colours(len(self.sigma))
        for (name, sigma), colour in zip(self.sigma.items(), colours):
            sigma = sigma.detach().cpu().double()
            total, largest = float(sigma.sum()) or 1.0, float(sigma.max()) or 1.0
            order = range(1, len(sigma) + 1)
            tail = (total - sigma.cumsum(0)).clamp_min(0) / total
            values.plot(order, (sigma / largest).clamp_min(1e-16), color=colour, label=name or "(model)", marker=".")
            energy.plot(order, tail.clamp_min(1e-16), color=colour, marker=".")
        if tolerance is not None:
            energy.axhline(tolerance, color="black", linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
            energy.legend(frameon=False)
        for axes, label in (
            (values, "Hankel singular value / largest"),
            (energy, "share of Hankel energy beyond the state"),
        ):
            axes.set(yscale="log", xlabel="state", ylabel=label, ylim=(_floor(self.sigma.values()), 1.5))
            axes.grid(alpha=0.3)
        if len(self.sigma) <= MOST_LEGEND_ENTRIES:
            values.legend(frameon=False, fontsize="small")
        else:
            _add_depth_scale(figure, values, len(self.sigma))
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _draw_losses(axes: Axes, rows: Sequence[SizeRow]) -> None:
    known = sorted((row.state_size, row.loss) for row in rows if row.loss is not None)
    axes.plot([size for size, _ in known], [loss for _, loss in known], marker=".")
    axes.axhline(rows[0].loss, color="black", linestyle="--", linewidth=1, label="before a cut")
    axes.set(xscale="log", xlabel="state size", ylabel="loss after a cut, on other batches")
    axes.set_xticks([size for size, _ in known], [str(size) for size, _ in known], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def layer_colours(count: int) -> list:
    """One colour a layer: distinct ones where a legend names them, else a scale from the first layer to the last."""
    from matplotlib import colormaps

    if count <= MOST_LEGEND_ENTRIES:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["viridis"](i / (count - 1)) for i in range(count)]


def _floor(spectra) -> float:
    """The lower end of the picture: just below the smallest value that is not rounding."""
    smallest = [float((sigma[sigma > 0] / sigma.max()).min()) for sigma in spectra if bool((sigma > 0).any())]
    return max(min(smallest, default=1e-4) / 3, 1e-9)


def _add_depth_scale(figure, axes, count: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, count - 1), colormaps["viridis"])
    figure.colorbar(scale, ax=axes, label="layer, from the input")
