"""Checkpoint folders: whether they are whole, how old ones are replaced, and the mark of a running training."""

import os

from .replacing import set_aside_incomplete
from .running_mark import is_active, mark_active

__all__ = ["is_active", "mark_active", "os", "set_aside_incomplete"]
