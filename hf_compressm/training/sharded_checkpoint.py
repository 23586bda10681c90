"""The checkpoint of an FSDP run, read into a model that is whole, and written again after a cut of that model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import UnsupportedModelError
from .checkpoints import UNFINISHED_PREFIX, after_replacing, before_replacing

_WHOLE_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


class ShardedCheckpoint:
    """
    A checkpoint of an FSDP run, in either of the forms that hold tensors by name.

    With `FULL_STATE_DICT` weights and moments are in one file each, with `SHARDED_STATE_DICT` in a folder each, in the
    form of `torch.distributed.checkpoint`. Every process can read it; one process writes.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        [`~errors.UnsupportedModelError`]: it holds no FSDP weights in one of these forms.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not self._file(FSDP_MODEL_NAME).is_file() and not self._shards(FSDP_MODEL_NAME).is_dir():
            raise UnsupportedModelError(
                f"{folder} holds neither {self._file(FSDP_MODEL_NAME).name} nor {self._shards(FSDP_MODEL_NAME).name}/. "
                "A cut under FSDP goes through the checkpoint: use state_dict_type FULL_STATE_DICT or "
                "SHARDED_STATE_DICT, with save_only_model=False."
            )

    @property
    def state(self) -> TrainerState:
        """The Trainer's state at the checkpoint."""
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))

    def load_weights(self, model: nn.Module) -> None:
        """
        Load the weights into a model that is not wrapped yet, at their sizes and in their dtype.

        Args:
            model (`torch.nn.Module`): The model; its layers follow the checkpoint's sizes (see
                [`~training.resume.follow_checkpoints`]).

        Raises:
            [`~errors.UnsupportedModelError`]: the checkpoint is one of another model.
        """
        weights = self._read(FSDP_MODEL_NAME, "model")
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # FSDP keeps its weights in float32 where the computation is in half precision; none of it may get lost.
            if name in weights and parameter.is_floating_point():
                parameter.data = parameter.data.to(weights[name].dtype)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UnsupportedModelError(f"the weights in {self.folder} do not fit the model: {error}") from error

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """
        Load the optimizer's state of every parameter, onto the parameter's device.

        Args:
            model (`torch.nn.Module`): The model with the checkpoint's weights.
            optimizer (`torch.optim.Optimizer`): Trains it; one that has made no step.

        Raises:
            [`~errors.UnsupportedModelError`]: its groups are not those of the checkpoint.
        """
        saved = self._read(OPTIMIZER_NAME, "optimizer")
        groups = _names_in_groups(model, optimizer)
        if [sorted(group["params"]) for group in saved["param_groups"]] != [sorted(names) for names in groups]:
            raise UnsupportedModelError(
                f"the optimizer's parameter groups are not those that {self.folder} was saved with. Make the same "
                "optimizer for every segment of the run."
            )
        parameters = dict(model.named_parameters())
        for name, state in saved["state"].items():
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
        fresh = self.folder.with_name(UNFINISHED_PREFIX + self.folder.name)
        if fresh.exists():
            shutil.rmtree(fresh)
        stale = () if model is None else (f"{FSDP_MODEL_NAME}*", f"{OPTIMIZER_NAME}*", *_WHOLE_WEIGHTS)
        shutil.copytree(self.folder, fresh, ignore=shutil.ignore_patterns(TRAINER_STATE_NAME, *stale))
        if model is not None:
            if any(self.folder.glob(_WHOLE_WEIGHTS[0])) and isinstance(model, PreTrainedModel):
                model.save_pretrained(fresh)
            self._write(fresh, FSDP_MODEL_NAME, "model", model.state_dict())
            self._write(fresh, OPTIMIZER_NAME, "optimizer", self._optimizer_state(model, optimizer))
        # As in every checkpoint, what tells that it is whole comes last.
        state.save_to_json(str(fresh / TRAINER_STATE_NAME))
        before_replacing(self.folder.parent, state.global_step)
        fresh.rename(self.folder)
        after_replacing(self.folder.parent, state.global_step)

    def _optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state by parameter name, with an entry for every parameter: FSDP loads all or nothing."""
        settings = self._read(OPTIMIZER_NAME, "optimizer")["param_groups"]
        groups = _names_in_groups(model, optimizer)
        parameters = dict(model.named_parameters())
        example = next(((p, state) for p, state in optimizer.state.items() if state), None)
        state = {
            name: optimizer.state.get(parameters[name]) or _fresh_state(parameters[name], *example)
            for names in groups
            for name in names
            if example is not None
        }
        return {"state": state, "param_groups": [{**old, "params": names} for old, names in zip(settings, groups)]}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _shards(self, name: str) -> Path:
        return self.folder / f"{name}_0"

    def _read(self, name: str, key: str) -> dict[str, Any]:
        if self._file(name).is_file():
            return torch.load(self._file(name), map_location="cpu", weights_only=True, mmap=True)
        metadata = FileSystemReader(self._shards(name)).read_metadata()
        entries: dict[str, Any] = {
            entry: torch.empty(kind.size, dtype=kind.properties.dtype) if isinstance(kind, TensorStorageMetadata) else 0
            for entry, kind in metadata.state_dict_metadata.items()
        }
        distributed_checkpoint.load(entries, checkpoint_id=self._shards(name), no_dist=True)
        return _nested({metadata.planner_data[entry]: value for entry, value in entries.items()})[key]

    def _write(self, folder: Path, name: str, key: str, content: dict[str, Any]) -> None:
        content = _on_cpu(content)
        if self._file(name).is_file():
            torch.save(content, folder / self._file(name).name)
        else:
            target = folder / self._shards(name).name
            distributed_checkpoint.save({key: content}, checkpoint_id=target, no_dist=True)


def _names_in_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _fresh_state(parameter: Tensor, example: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """
    The state of a parameter before its first step, made after that of another parameter.

    Raises:
        [`~errors.UnsupportedModelError`]: the optimizer keeps more than moments of the parameter's shape and scalars.
    """
    fresh = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == example.shape:
            fresh[key] = torch.zeros_like(parameter, dtype=value.dtype)
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            fresh[key] = value * 0
        else:
            raise UnsupportedModelError(
                f"the optimizer keeps {key!r} in a form of its own, and the cut adds a parameter that has none yet. "
                "Train with AdamW under FSDP, or set stock=True."
            )
    return fresh


def _nested(entries: dict[tuple, Any]) -> Any:
    """Nested dictionaries and lists from values by their path; an integer in a path is a place in a list."""
    if list(entries) == [()]:
        return entries[()]
    parts: dict[Any, dict[tuple, Any]] = {}
    for (head, *rest), value in entries.items():
        parts.setdefault(head, {})[tuple(rest)] = value
    if all(isinstance(head, int) for head in parts):
        return [_nested(parts[place]) for place in sorted(parts)]
    return {head: _nested(part) for head, part in parts.items()}


def _on_cpu(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_on_cpu(value) for value in content]
    return content.detach().to("cpu", copy=True) if isinstance(content, Tensor) else content
