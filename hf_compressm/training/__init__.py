"""The floor that knows the Trainer."""

from .callback import CompreSSMCallback
from .schedule import check_steps

__all__ = ["CompreSSMCallback", "check_steps"]
