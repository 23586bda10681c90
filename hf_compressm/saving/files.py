"""What is saved next to a compressed model's weights: history, picture of the spectra, settings and card."""

from __future__ import annotations

import functools
import io
import os
from dataclasses import replace
from pathlib import Path

from ..cards.merge import merge_card
from ..cards.provenance import Provenance
from ..cards.section import PICTURE_NAME, render_card
from ..compression.history import write_history
from ..compression.spectrum import Spectrum
from ..files import replace_file
from .adapters import holds_adapter

CARD_NAME = "README.md"


def write_model_files(folder: str | os.PathLike, provenance: Provenance) -> None:
    """
    Write history, picture, settings and card into a model's folder, each file as a whole or not at all.

    A card that is there is merged with, see [`~cards.merge_card`]. Without any check nothing is written,
    without any spectrum no picture.

    Args:
        folder (`str` or `os.PathLike`): The folder, which exists.
        provenance ([`Provenance`]): The facts.

    Raises:
        [`~errors.CardError`]: the metadata of the card that is there cannot be read.
        `OSError`: a file could not be written; the old one is still there.
    """
    if not provenance.layers():
        return
    folder = Path(folder)
    write_history(list(provenance.records), folder)
    if provenance.config is not None:
        provenance.config.save_pretrained(folder)
    picture = spectrum_picture(provenance)
    if picture is not None:
        replace_file(folder / PICTURE_NAME, picture)
    provenance = replace(provenance, is_adapter=provenance.is_adapter or holds_adapter(folder))
    write_card(folder, merge_card(read_card(folder), render_card(provenance, has_picture=picture is not None)))


def spectrum_picture(provenance: Provenance) -> bytes | None:
    """The spectra before the first cut (or of the last check, where nothing was cut) as a PNG file, or None."""
    seen = [record for record in provenance.records if record.outcome != "rolled_back" and record.layers]
    if not provenance.cuts and not seen:
        return None
    record = provenance.cuts[0] if provenance.cuts else seen[-1]
    config = provenance.config
    tolerance = config.tolerance if config is not None and config.strategy == "tolerance" else None
    spectra = tuple((layer.name, tuple(layer.hankel_singular_values)) for layer in record.layers)
    return _draw(spectra, tolerance)


# Every checkpoint of a run shows the same picture until the next cut.
@functools.lru_cache(maxsize=4)
def _draw(spectra: tuple[tuple[str, tuple[float, ...]], ...], tolerance: float | None) -> bytes:
    import torch

    sigma = {name: torch.tensor(values, dtype=torch.float64) for name, values in spectra}
    picture = io.BytesIO()
    Spectrum(sigma).plot(tolerance=tolerance).savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def read_card(folder: str | os.PathLike) -> str | None:
    """The text of a folder's card, or None where there is none."""
    path = Path(folder) / CARD_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def write_card(folder: str | os.PathLike, text: str) -> None:
    """Replace a folder's card as a whole."""
    replace_file(Path(folder) / CARD_NAME, text.encode("utf-8"))
