"""What one process of the FSDP tests does: train a tiny model in segments and write down what it ended with."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMError, train_in_segments  # noqa: E402
from hf_compressm.training.segments import checkpoint as segment_checkpoint  # noqa: E402
from tests.cases import tiny_lru, tiny_mamba  # noqa: E402
from tests.delta_rule_models import tiny_gated_delta_net  # noqa: E402
from tests.distributed.worker import (  # noqa: E402
    JOINT_BATCH,
    RANK,
    STEPS,
    TWICE,
    WORLD,
    OwnLoss,
    calibration_batch,
    dataset,
    ended,
    run_cases,
)
from tests.selective_models import tiny_mamba2  # noqa: E402

_initialise = accelerate.state.AcceleratorState.__init__


def _initialise_with_fsdp(self, *args: Any, **settings: Any) -> None:
    """Of accelerate 1.15 this is what is missing on a CPU, where it takes DistributedDataParallel instead."""
    _initialise(self, *args, **settings)
    plugin = settings.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


accelerate.state.AcceleratorState.__init__ = _initialise_with_fsdp


def trainer_factory(
    build: Callable[[], torch.nn.Module],
    folder: Path,
    layer: str,
    form: str,
    config: dict[str, Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
) -> Callable[[], Trainer]:
    """What `train_in_segments` takes: the training of the DDP tests, sharded."""

    def make_trainer() -> Trainer:
        args = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=JOINT_BATCH // WORLD, learning_rate=1e-2,
            lr_scheduler_type="linear", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
            train_sampling_strategy="sequential", save_strategy="steps", save_steps=STEPS, fsdp=True,
            fsdp_config={
                "version": 2, "state_dict_type": form, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": [layer],
            },
        )  # fmt: skip
        settings = {"strategy": "fixed", "keep_ratio": 0.5, "window": (3, 6), "interval": 3, **(config or {})}
        # Readouts are fitted to what the first process has seen, which a run in one process sees with the rest.
        callback = CompreSSMCallback(
            CompreSSMConfig(**{"fit_readout": False, **settings}), calibration_batches=[calibration_batch()]
        )
        return trainer_class(model=build(), args=args, train_dataset=dataset(), callbacks=[callback])

    return make_trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a process ends with, its shards put together."""
    callback = next(held for held in trainer.callback_handler.callbacks if isinstance(held, CompreSSMCallback))
    found = ended(trainer, callback)
    sharded = sum(isinstance(parameter, DTensor) for parameter in found["parameters"].values())
    found["parameters"] = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in found["parameters"].items()
    }
    logged = [entry for entry in trainer.state.log_history if "compressm/parameters" in entry]
    return {**found, "sharded": sharded, "logged": [entry["step"] for entry in logged]}


def segments(
    build: Callable[[], torch.nn.Module],
    layer: str,
    form: str = "FULL_STATE_DICT",
    config: dict | None = None,
    trainer_class: type[Trainer] = Trainer,
) -> Callable[[Path], dict[str, Any]]:
    """A case that trains in segments and saves what it ended with."""

    def run(folder: Path) -> dict[str, Any]:
        trainer = train_in_segments(trainer_factory(build, folder, layer, form, config, trainer_class))
        trainer.save_model(folder / "saved")
        return {**outcome(trainer), "class": type(trainer.model).__name__}

    return run


def without_moments(folder: Path) -> dict[str, Any]:
    """The negative control: the optimizer in the checkpoint forgets what it knew."""
    load = segment_checkpoint.SegmentCheckpoint.load_optimizer

    def forget(self, model, optimizer):
        load(self, model, optimizer)
        for state in optimizer.state.values():
            state.update({name: value * 0 for name, value in state.items()})

    segment_checkpoint.SegmentCheckpoint.load_optimizer = forget
    try:
        return segments(tiny_mamba, "MambaBlock")(folder)
    finally:
        segment_checkpoint.SegmentCheckpoint.load_optimizer = load


def without_segments(folder: Path) -> dict[str, Any]:
    """The callback alone, which cannot cut what is sharded."""
    try:
        trainer_factory(tiny_mamba, folder, "MambaBlock", "FULL_STATE_DICT")().train()
    except CompreSSMError as error:
        return {"error": str(error)}
    return {"error": None}


def killed(folder: Path) -> dict[str, Any]:
    """The first process is killed while it writes the second cut, before the folder takes its name."""
    save = segment_checkpoint.TrainerState.save_to_json

    def die(self, path):
        save(self, path)
        if "unfinished" in str(path) and self.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    if RANK == 0:
        segment_checkpoint.TrainerState.save_to_json = die
    return segments(tiny_mamba, "MambaBlock", "SHARDED_STATE_DICT", TWICE)(folder)


def relaunched(folder: Path) -> dict[str, Any]:
    """What `killed` left, resumed."""
    folder = folder.with_name(f"killed-{WORLD}")
    make_trainer = trainer_factory(tiny_mamba, folder, "MambaBlock", "SHARDED_STATE_DICT", TWICE)
    return outcome(train_in_segments(make_trainer, resume_from_checkpoint=True))


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "full": segments(tiny_mamba, "MambaBlock"),
    "twice_in_shards": segments(tiny_mamba, "MambaBlock", "SHARDED_STATE_DICT", TWICE),
    "mixed": segments(tiny_mamba2, "Mamba2Block"),
    "gated": segments(partial(tiny_gated_delta_net, "qwen3_5"), "Qwen3_5DecoderLayer"),
    "own_loss": segments(tiny_mamba2, "Mamba2Block", trainer_class=OwnLoss),
    "lru": segments(partial(tiny_lru, norm="layer"), "SequenceBlock"),
    "without_moments": without_moments,
    "without_segments": without_segments,
    "killed": killed,
    "relaunched": relaunched,
}

if __name__ == "__main__":
    run_cases(CASES)
