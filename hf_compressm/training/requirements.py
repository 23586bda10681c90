"""What a run must be like for a cut in the middle of it to be safe."""

from __future__ import annotations

from transformers import TrainingArguments

from ..errors import UnsupportedModelError


def require_plain_run(args: TrainingArguments) -> None:
    """
    Refuse a run whose wrapper keeps copies or buckets of the parameters that a cut would leave stale.

    The refusal comes before the first step. Several processes under DistributedDataParallel are no reason for one: its
    reducer is made anew with every cut (see `data_parallel.py`).

    Args:
        args (`transformers.TrainingArguments`): The run's arguments.

    Raises:
        [`~errors.UnsupportedModelError`]: the run spreads one process over several GPUs, or uses FSDP or DeepSpeed.
    """
    problems = [
        (args.n_gpu > 1, f"spreads one process over {args.n_gpu} GPUs with DataParallel"),
        (bool(args.fsdp), "uses FSDP"),
        (bool(args.deepspeed), "uses DeepSpeed"),
    ]
    found = [problem for present, problem in problems if present]
    if found:
        raise UnsupportedModelError(
            f"this training {' and '.join(found)}, whose wrapper would not notice that a parameter became smaller. "
            "Train in one process, or with one process a device (torchrun) under DistributedDataParallel, or train "
            "without the callback and use compress() afterwards."
        )
