"""What one process of the DeepSpeed tests does: train a tiny model in segments and write down what it ended with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

# Read when DeepSpeed is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMError, train_in_segments  # noqa: E402
from hf_compressm.training.segments.train import checkpoint as segment_checkpoint  # noqa: E402
from tests.cases import tiny_mamba  # noqa: E402
from tests.distributed.worker import (  # noqa: E402
    JOINT_BATCH,
    STEPS,
    TWICE,
    WORLD,
    calibration_batch,
    dataset,
    ended,
    run_cases,
)
from tests.selective_models import tiny_mamba2  # noqa: E402


def arguments(folder: Path, stage: int, **more: Any) -> TrainingArguments:
    """Those of the DDP tests, with their optimizer inside of a ZeRO stage."""
    return TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=JOINT_BATCH // WORLD, learning_rate=1e-2,
        lr_scheduler_type="linear", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="steps", save_steps=STEPS,
        deepspeed={
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, **more,
        },
    )  # fmt: skip


def trainer_factory(
    build: Callable[[], torch.nn.Module],
    make_arguments: Callable[[], TrainingArguments],
    config: dict[str, Any] | None = None,
) -> Callable[[], Trainer]:
    """What `train_in_segments` takes."""

    def make_trainer() -> Trainer:
        model = build()
        args = make_arguments()
        settings = {"strategy": "fixed", "keep_ratio": 0.5, "window": (3, 6), "interval": 3, **(config or {})}
        # Readouts are fitted to what the first process has seen, which a run in one process sees with the rest.
        callback = CompreSSMCallback(
            CompreSSMConfig(**{"fit_readout": False, **settings}), calibration_batches=[calibration_batch()]
        )
        return Trainer(model=model, args=args, train_dataset=dataset(), callbacks=[callback])

    return make_trainer


def segments(
    build: Callable[[], torch.nn.Module], stage: int, config: dict[str, Any] | None = None, once: bool = False
) -> Callable[[Path], dict[str, Any]]:
    """A case that trains in segments, with arguments made for each or `once` for all."""

    def case(folder: Path) -> dict[str, Any]:
        make_arguments = partial(arguments, folder, stage)
        trainer = train_in_segments(trainer_factory(build, cache(make_arguments) if once else make_arguments, config))
        callback = next(held for held in trainer.callback_handler.callbacks if isinstance(held, CompreSSMCallback))
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters()) if stage == 3 else []):
            return ended(trainer, callback)

    return case


def without_moments(folder: Path) -> dict[str, Any]:
    """The negative control: the optimizer in the checkpoint forgets what it knew."""
    load = segment_checkpoint.SegmentCheckpoint.load_optimizer

    def forget(self, model, optimizer):
        load(self, model, optimizer)
        for state in optimizer.state.values():
            state.update({name: value * 0 for name, value in state.items()})

    segment_checkpoint.SegmentCheckpoint.load_optimizer = forget
    try:
        return segments(tiny_mamba, 2)(folder)
    finally:
        segment_checkpoint.SegmentCheckpoint.load_optimizer = load


def refused(train: Callable[[Path], Any]) -> Callable[[Path], dict[str, Any]]:
    """A case that ends with an error of ours."""

    def case(folder: Path) -> dict[str, Any]:
        try:
            train(folder)
        except CompreSSMError as error:
            return {"error": str(error)}
        return {"error": ""}

    return case


def partitioned_mamba() -> torch.nn.Module:
    """What `from_pretrained` does where ZeRO-3 is known of already."""
    model = tiny_mamba()
    deepspeed.zero.Init(module=model)
    return model


def with_own_optimizer(folder: Path) -> None:
    """The optimizer of the DeepSpeed config."""
    section = {"type": "AdamW", "params": {"lr": "auto"}}
    train_in_segments(trainer_factory(tiny_mamba, partial(arguments, folder, 2, optimizer=section)))


def with_a_partitioned_model(folder: Path) -> None:
    """A model whose parameters were shards before the Trainer saw it."""
    train_in_segments(trainer_factory(partitioned_mamba, partial(arguments, folder, 3)))


def without_segments(folder: Path) -> None:
    """The callback and `Trainer.train`."""
    trainer_factory(tiny_mamba, partial(arguments, folder, 2))().train()


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zero1": segments(tiny_mamba, 1),
    "zero2_twice": segments(tiny_mamba, 2, TWICE),
    "zero3": segments(tiny_mamba, 3),
    "zero3_twice": segments(tiny_mamba, 3, TWICE),
    "arguments_once": segments(tiny_mamba, 3, TWICE, once=True),
    "zero2_mixed": segments(tiny_mamba2, 2),
    "without_moments": without_moments,
    "partitioned": refused(with_a_partitioned_model),
    "own_optimizer": refused(with_own_optimizer),
    "alone": refused(without_segments),
}

if __name__ == "__main__":
    run_cases(CASES)
