"""The page of HTML that shows a run and stands by itself."""

from __future__ import annotations

import base64
import io
from importlib import resources

from ..cards import RunReport


def draw_run(run: RunReport) -> bytes:
    """The picture of a run as a PNG file."""
    picture = io.BytesIO()
    run.plot().savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def render_page(run: RunReport, picture: bytes) -> str:
    """
    The page: style, picture and tables in one file. Everything that comes from the run is escaped.

    Args:
        run ([`RunReport`]): The run.
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
