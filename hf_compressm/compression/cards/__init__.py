"""Model cards: what was done to a model, told beside its weights."""

from .carry import carried_provenance, carry, describe, describe_folder
from .consistency import require_one_model, require_safe_weights, state_sizes
from .files import CARD_NAME, read_card, replace_file, spectrum_picture, write_card, write_model_files
from .merge import is_machine_made, merge_card, merge_trainer_card, read_metadata, renamed
from .own_class import own_class, with_own_class
from .provenance import Evaluation, Provenance
from .section import (
    PICTURE_NAME,
    checks_table,
    evaluation_table,
    layers_table,
    render_card,
    template_text,
)

__all__ = [
    "CARD_NAME",
    "PICTURE_NAME",
    "Evaluation",
    "Provenance",
    "carried_provenance",
    "carry",
    "checks_table",
    "describe",
    "describe_folder",
    "evaluation_table",
    "is_machine_made",
    "layers_table",
    "merge_card",
    "merge_trainer_card",
    "own_class",
    "read_card",
    "read_metadata",
    "render_card",
    "renamed",
    "replace_file",
    "require_one_model",
    "require_safe_weights",
    "spectrum_picture",
    "state_sizes",
    "template_text",
    "with_own_class",
    "write_card",
    "write_model_files",
]
