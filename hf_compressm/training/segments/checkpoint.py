"""The checkpoint between two segments of a sharded run: read into a model that is whole, and written after its cut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ...errors import UnsupportedModelError
from ..checkpoints.replacing import UNFINISHED_PREFIX, after_replacing, before_replacing

_WHOLE_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


class SegmentCheckpoint:
    """
    What the wrappers' checkpoints have in common; one subclass for each wrapper.

    Sizes can be read at any time. Around a check, the first process calls [`open_for_cut`] before any process reads the
    weights, and [`write`] at the end.

    Args:
        folder (`Path`): The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fresh = folder.with_name(UNFINISHED_PREFIX + folder.name)

    @property
    def state(self) -> TrainerState:
        """The Trainer's state at the checkpoint."""
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))

    def prepare(self, trainer: Trainer) -> None:
        """Let a Trainer that is to resume from the checkpoint know its form."""

    def open_for_cut(self) -> None:
        """Make ready what the weights are read from; by the first process."""

    def load_sizes(self, model: nn.Module) -> None:
        """
        Give a model that is not wrapped yet the sizes of the checkpoint; its weights are left undefined.

        Args:
            model (`torch.nn.Module`): Its layers follow a checkpoint's sizes (see
                [`~training.resume.follow_checkpoints`]).

        Raises:
            [`~errors.UnsupportedModelError`]: the checkpoint is one of another model.
        """
        present = model.state_dict()
        # Views of a single zero: only the shapes are wanted.
        shaped = {name: torch.zeros(()).expand(shape) for name, shape in self._shapes().items()}
        self._load(model, {**present, **shaped})

    def load_weights(self, model: nn.Module) -> None:
        """
        Load the weights into a model that is not wrapped, at their sizes and in the dtype in which they are trained.

        Args:
            model (`torch.nn.Module`): As for [`load_sizes`].

        Raises:
            [`~errors.UnsupportedModelError`]: the checkpoint is one of another model.
        """
        weights = self._weights()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # Wrappers train in float32 what they compute in half precision; none of it may get lost.
            if name in weights and parameter.is_floating_point():
                parameter.data = parameter.data.to(weights[name].dtype)
        self._load(model, weights)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """
        Load the optimizer's state of every parameter, onto the parameter's device.

        Args:
            model (`torch.nn.Module`): The model with the checkpoint's weights.
            optimizer (`torch.optim.Optimizer`): Trains it; one that has made no step.

        Raises:
            [`~errors.UnsupportedModelError`]: its groups are not those of the checkpoint.
        """
        if [sorted(names) for names in self._groups()] != [
            sorted(names) for names in names_in_groups(model, optimizer)
        ]:
            raise UnsupportedModelError(
                f"the optimizer's parameter groups are not those that {self.folder} was saved with. Make the same "
                "optimizer for every segment of the run."
            )
        parameters = dict(model.named_parameters())
        for name, state in self._moments().items():
            parameter = parameters[name]
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                for key, value in state.items()
            }

    def write(
        self, state: TrainerState, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """
        Write the checkpoint again with another state of the Trainer and, where given, other weights and moments.

        The new folder is complete before it takes the place of the old one, whose files are deleted last.

        Args:
            state (`transformers.TrainerState`): The state to write.
            model (`torch.nn.Module`, *optional*): The model, cut; with `optimizer`.
            optimizer (`torch.optim.Optimizer`, *optional*): Its optimizer, cut with it.
        """
        if model is None:
            self._copy()
        else:
            self._write_cut(model, optimizer)
            if any(self.folder.glob(_WHOLE_WEIGHTS[0])) and isinstance(model, PreTrainedModel):
                model.save_pretrained(self.fresh)
        # As in every checkpoint, what shows that it is whole comes last.
        state.save_to_json(str(self.fresh / TRAINER_STATE_NAME))
        before_replacing(self.folder.parent, state.global_step)
        self.fresh.rename(self.folder)
        after_replacing(self.folder.parent, state.global_step)

    def _copy(self, *without: str) -> None:
        """Begin a new folder with the files of the old one."""
        if self.fresh.exists():
            shutil.rmtree(self.fresh)
        whole = _WHOLE_WEIGHTS if without else ()
        ignored = shutil.ignore_patterns(TRAINER_STATE_NAME, *whole, *without)
        shutil.copytree(self.folder, self.fresh, ignore=ignored)

    def _load(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UnsupportedModelError(f"the weights in {self.folder} do not fit the model: {error}") from error

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        raise NotImplementedError

    def _weights(self) -> dict[str, Tensor]:
        """All tensors of the model's state dict."""
        raise NotImplementedError

    def _groups(self) -> list[list[str]]:
        """The names of the parameters in each group of the optimizer."""
        raise NotImplementedError

    def _moments(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state of every parameter."""
        raise NotImplementedError

    def _write_cut(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the new folder: everything but the Trainer's state."""
        raise NotImplementedError


def names_in_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer of a model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def complete_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, same_step: bool = False
) -> dict[str, dict[str, Any]]:
    """
    The optimizer's state by parameter name, with an entry for every parameter: wrappers load all or nothing.

    Args:
        model (`torch.nn.Module`): The model.
        optimizer (`torch.optim.Optimizer`): Its optimizer.
        same_step (`bool`, *optional*, defaults to `False`): A parameter without a state yet gets the step count of the
            others, for a wrapper that keeps one count for all of them.

    Raises:
        [`~errors.UnsupportedModelError`]: the optimizer keeps more than moments of the parameter's shape and scalars,
            and a parameter has none yet.
    """
    example = next(((parameter, state) for parameter, state in optimizer.state.items() if state), None)
    if example is None:
        return {}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        name: optimizer.state.get(parameter) or fresh_state(parameter, *example, same_step)
        for name, parameter in model.named_parameters()
        if id(parameter) in trained
    }


def fresh_state(parameter: Tensor, example: Tensor, state: dict[str, Any], same_step: bool = False) -> dict[str, Any]:
    """
    The state of a parameter that the optimizer has made no step for.

    Args:
        parameter (`torch.Tensor`): The parameter.
        example (`torch.Tensor`): Another one.
        state (`dict[str, Any]`): The optimizer's state of the other one.
        same_step (`bool`, *optional*, defaults to `False`): Take over the counts of the other one.

    Raises:
        [`~errors.UnsupportedModelError`]: the state holds more than scalars and tensors of the parameter's shape.
    """
    fresh = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == example.shape:
            fresh[key] = torch.zeros_like(parameter, dtype=value.dtype)
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            fresh[key] = value if same_step else value * 0
        else:
            raise UnsupportedModelError(
                f"the optimizer keeps {key!r} in a form of its own, and the cut adds a parameter that has none yet. "
                "Train with AdamW, or set stock=True."
            )
    return fresh


def on_cpu(content: Any) -> Any:
    """A copy, on the CPU, of nested dictionaries and lists of tensors and other values."""
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [on_cpu(value) for value in content]
    return content.detach().to("cpu", copy=True) if isinstance(content, Tensor) else content
