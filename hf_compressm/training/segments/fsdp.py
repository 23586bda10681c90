"""The checkpoint of an FSDP run, in either of the forms that hold tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...errors import UnsupportedModelError
from .checkpoint import SegmentCheckpoint, complete_moments, names_in_groups, on_cpu


class FSDPCheckpoint(SegmentCheckpoint):
    """
    A checkpoint of an FSDP run.

    With `FULL_STATE_DICT` weights and moments are in one file each, with `SHARDED_STATE_DICT` in a folder each, in the
    form of `torch.distributed.checkpoint`.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        [`~errors.UnsupportedModelError`]: it holds no FSDP weights in one of these forms.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not self._file(FSDP_MODEL_NAME).is_file() and not self._shards(FSDP_MODEL_NAME).is_dir():
            raise UnsupportedModelError(
                f"{folder} holds neither {self._file(FSDP_MODEL_NAME).name} nor {self._shards(FSDP_MODEL_NAME).name}/. "
                "A cut under FSDP goes through the checkpoint: use state_dict_type FULL_STATE_DICT or "
                "SHARDED_STATE_DICT, with save_only_model=False."
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self._file(FSDP_MODEL_NAME).is_file():
            return {name: tuple(tensor.shape) for name, tensor in self._weights().items()}
        metadata = FileSystemReader(self._shards(FSDP_MODEL_NAME)).read_metadata()
        entries = metadata.state_dict_metadata.items()
        return {metadata.planner_data[entry][1]: tuple(kind.size) for entry, kind in entries}

    def _weights(self) -> dict[str, Tensor]:
        return self._read(FSDP_MODEL_NAME, "model")

    def _groups(self) -> list[list[str]]:
        return [group["params"] for group in self._read(OPTIMIZER_NAME, "optimizer")["param_groups"]]

    def _moments(self) -> dict[str, dict[str, Any]]:
        return self._read(OPTIMIZER_NAME, "optimizer")["state"]

    def _write_cut(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        settings = self._read(OPTIMIZER_NAME, "optimizer")["param_groups"]
        groups = [{**old, "params": new} for old, new in zip(settings, names_in_groups(model, optimizer))]
        self._copy(f"{FSDP_MODEL_NAME}*", f"{OPTIMIZER_NAME}*")
        self._write(FSDP_MODEL_NAME, "model", model.state_dict())
        self._write(OPTIMIZER_NAME, "optimizer", {"state": complete_moments(model, optimizer), "param_groups": groups})

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
        return nested({metadata.planner_data[entry]: value for entry, value in entries.items()})[key]

    def _write(self, name: str, key: str, content: dict[str, Any]) -> None:
        content = on_cpu(content)
        if self._file(name).is_file():
            torch.save(content, self.fresh / self._file(name).name)
        else:
            target = self.fresh / self._shards(name).name
            distributed_checkpoint.save({key: content}, checkpoint_id=target, no_dist=True)


def nested(entries: dict[tuple, Any]) -> Any:
    """
    Nested dictionaries and lists from values by their path; an integer in a path is a place in a list.

    Example:

    ```python
    >>> from hf_compressm.training.segments.fsdp import nested

    >>> nested({("state", "weight", "step"): 1, ("groups", 0, "lr"): 0.1})
    {'state': {'weight': {'step': 1}}, 'groups': [{'lr': 0.1}]}

    ```
    """
    if list(entries) == [()]:
        return entries[()]
    parts: dict[Any, dict[tuple, Any]] = {}
    for (head, *rest), value in entries.items():
        parts.setdefault(head, {})[tuple(rest)] = value
    if all(isinstance(head, int) for head in parts):
        return [nested(parts[place]) for place in sorted(parts)]
    return {head: nested(part) for head, part in parts.items()}
