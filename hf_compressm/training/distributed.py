"""The processes of a training, as `torch.distributed` knows them: sums, one decision, agreement, word of a failure."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..compression.processes import Processes, SingleProcess, Value
from ..config import CompreSSMConfig
from ..errors import DisagreementError, OtherProcessError

_LIBRARIES = ("hf-compressm", "torch", "transformers", "accelerate")


def processes_of_training() -> Processes:
    """The default process group, or one process where there is none."""
    initialised = dist.is_available() and dist.is_initialized()
    return DistributedProcesses() if initialised and dist.get_world_size() > 1 else SingleProcess()


def run_facts(config: CompreSSMConfig, layers: dict[str, int]) -> dict[str, Any]:
    """
    What has to be the same in all processes before a training starts.

    Args:
        config ([`CompreSSMConfig`]): The settings.
        layers (`dict[str, int]`): State size of each layer, by its name.
    """
    facts = {f"setting {name}": value for name, value in config.to_dict().items()}
    for library in _LIBRARIES:
        try:
            facts[f"version of {library}"] = version(library)
        except PackageNotFoundError:
            facts[f"version of {library}"] = None
    return {**facts, "state sizes": layers}


class DistributedProcesses:
    """
    All processes of the default process group.

    Before every sum the processes exchange whether they are well, so that one which has failed keeps none of the
    others waiting.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its own dtype and on its device."""
        self._exchange(None)
        # NCCL sums what is on its device only.
        on_device = dist.get_backend() == "nccl" and tensor.device.type != "cuda"
        summed = tensor.detach().to(torch.device("cuda", torch.cuda.current_device()) if on_device else tensor.device)
        summed = summed.clone() if summed is tensor else summed.contiguous()
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def first(self, value: Value) -> Value:
        """What the first process has; on the CPU in the others."""
        self._exchange(None)
        shared = [_on_cpu(value) if self.rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        return value if self.rank == 0 else shared[0]

    def agree(self, subject: str, facts: dict[str, Any]) -> None:
        """Make sure that all processes say the same."""
        digests = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
        everyone = self._exchange(digests)
        differing = {
            rank: sorted(name for name in {**everyone[0], **received} if received.get(name) != everyone[0].get(name))
            for rank, received in enumerate(everyone)
            if received != everyone[0]
        }
        if differing:
            ranks = "; ".join(f"process {rank} in {', '.join(names)}" for rank, names in differing.items())
            raise DisagreementError(
                f"the processes do not agree on {subject}. Different from process 0: {ranks}. Start all with the "
                "same settings, data and library versions. Nothing was changed."
            )

    def failed(self, error: BaseException) -> None:
        """Let the others know, which wait in [`sum`], [`first`] or [`agree`], that this process will not come."""
        received: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(received, f"{type(error).__name__}: {error}")

    def _exchange(self, payload: Any) -> list[Any]:
        received: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(received, {"payload": payload})
        failures = {rank: entry for rank, entry in enumerate(received) if isinstance(entry, str)}
        if failures:
            listed = "; ".join(f"process {rank}: {message}" for rank, message in failures.items())
            raise OtherProcessError(f"another process could not complete the check ({listed}). Nothing was changed.")
        return [entry["payload"] for entry in received]


def _on_cpu(value: Any) -> Any:
    """The same with every tensor on the CPU, where a process with another device can read it."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(part) for part in value)
    if isinstance(value, tuple):  # a named tuple, whose parts are arguments of their own
        return type(value)(*(_on_cpu(part) for part in value))
    if is_dataclass(value):
        return replace(value, **{field.name: _on_cpu(getattr(value, field.name)) for field in fields(value)})
    return value
