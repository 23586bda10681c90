"""Tables and pictures of spectra."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from hf_compressm import Spectrum
from hf_compressm.errors import ConfigurationError


def spectrum(layers: int) -> Spectrum:
    sigma = 10 ** -torch.arange(8, dtype=torch.float64)
    return Spectrum({f"layers.{i}": sigma * (i + 1) for i in range(layers)})


def test_the_table_has_a_row_a_layer_and_a_column_an_energy() -> None:
    lines = spectrum(2).table().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "layer", "state size", "0.9 of the energy", "0.95 of the energy", "0.99 of the energy", "0.999 of the energy",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["layers.0", "8", "1", "2", "2", "3"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_ranks_need_a_tolerance_that_is_allowed() -> None:
    with pytest.raises(ConfigurationError):
        spectrum(1).ranks(1.5)


@pytest.mark.parametrize("layers", [1, 3, 24])
def test_the_picture_shows_every_layer(layers: int, tmp_path) -> None:
    path = tmp_path / "spectrum.png"
    figure = spectrum(layers).plot(path, tolerance=0.01)
    values, energy = figure.axes[:2]
    assert len(values.lines) == layers and len(energy.lines) == layers + 1
    assert list(values.lines[0].get_ydata()[:2]) == pytest.approx([1.0, 0.1])
    assert list(energy.lines[0].get_ydata()[:2]) == pytest.approx([0.1, 0.01], rel=1e-3)
    assert Image.open(path).size[0] > 1000


def test_an_empty_spectrum_can_be_drawn() -> None:
    figure = Spectrum({"dead": torch.zeros(4, dtype=torch.float64)}).plot()
    assert len(figure.axes) == 2
