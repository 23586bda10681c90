"""The floor that knows the Trainer."""

from .callback import CompreSSMCallback
from .parameter_groups import state_space_parameter_groups
from .schedule import check_steps
from .segments.train import train_in_segments

__all__ = ["CompreSSMCallback", "check_steps", "state_space_parameter_groups", "train_in_segments"]
