"""Model cards and reports: what was done to a model, reported next to its weights."""

from .merge import is_machine_made, merge_card, merge_trainer_card, read_metadata, renamed
from .provenance import Evaluation, Provenance, describe_folder
from .run_report import RunReport
from .section import (
    PICTURE_NAME,
    checks_table,
    evaluation_table,
    layers_table,
    render_card,
    template_text,
)
from .verdict import verdict

__all__ = [
    "PICTURE_NAME",
    "Evaluation",
    "Provenance",
    "RunReport",
    "checks_table",
    "describe_folder",
    "evaluation_table",
    "is_machine_made",
    "layers_table",
    "merge_card",
    "merge_trainer_card",
    "read_metadata",
    "render_card",
    "renamed",
    "template_text",
    "verdict",
]
