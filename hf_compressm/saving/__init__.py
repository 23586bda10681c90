"""Folders: what follows a save, whether a folder is one model, own classes, adapters."""

from .adapters import holds_adapter, load_cut_layers
from .files import CARD_NAME, read_card, spectrum_picture, write_card, write_model_files
from .follow_saves import describe, follow_saves, provenance_of
from .one_model import require_one_model, require_safe_weights, state_sizes
from .own_class import own_class, with_own_class

__all__ = [
    "CARD_NAME",
    "provenance_of",
    "follow_saves",
    "describe",
    "holds_adapter",
    "load_cut_layers",
    "own_class",
    "read_card",
    "require_one_model",
    "require_safe_weights",
    "spectrum_picture",
    "state_sizes",
    "with_own_class",
    "write_card",
    "write_model_files",
]
