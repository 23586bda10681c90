"""What a run must be like for a cut in the middle of it to be safe."""

from __future__ import annotations

import os

import torch.distributed as dist
from transformers import TrainingArguments

from ..errors import UnsupportedModelError

# What accelerate takes for "yes" in the environment.
_YES = ("1", "on", "t", "true", "y", "yes")


def require_plain_run(args: TrainingArguments, is_whole: bool = False) -> None:
    """
    Refuse a run whose wrapper keeps copies or buckets of the parameters that a cut would leave stale.

    The refusal comes before the first step. Several processes under DistributedDataParallel are no reason for one: its
    reducer is made anew with every cut (see `data_parallel.py`).

    Args:
        args (`transformers.TrainingArguments`): The run's arguments.
        is_whole (`bool`, *optional*, defaults to `False`): The model is known not to be sharded, as on one device,
            where FSDP is asked for in vain.

    Raises:
        [`~errors.UnsupportedModelError`]: the run spreads one process over several GPUs, has processes that
            torch.distributed does not connect, or uses FSDP or DeepSpeed.
    """
    connected = dist.is_available() and dist.is_initialized()
    problems = [
        (args.world_size > 1 and not connected, f"runs in {args.world_size} processes outside of torch.distributed"),
        (args.n_gpu > 1, f"spreads one process over {args.n_gpu} GPUs with DataParallel"),
        (not is_whole and (bool(args.fsdp) or _launched_with(args, "FSDP")), "uses FSDP"),
        (bool(args.deepspeed) or _launched_with(args, "DEEPSPEED"), "uses DeepSpeed"),
    ]
    found = [problem for present, problem in problems if present]
    if found:
        raise UnsupportedModelError(
            f"this training {' and '.join(found)}, whose wrapper would not notice that a parameter became smaller. "
            "Train in one process, with one process a device (torchrun) under DistributedDataParallel, under FSDP or "
            "DeepSpeed by train_in_segments(), or without the callback and with compress() afterwards."
        )


def _launched_with(args: TrainingArguments, wrapper: str) -> bool:
    """Whether `accelerate launch` asks for a wrapper, which the arguments then say nothing of."""
    state = getattr(args, "distributed_state", None)
    kind = getattr(getattr(state, "distributed_type", None), "value", None)
    return kind == wrapper or os.environ.get(f"ACCELERATE_USE_{wrapper}", "").lower() in _YES
