"""Odd callbacks in the real Trainer: settings, batches, loss functions and the Trainer's own arguments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, read_history
from hf_compressm.architectures import find_layers
from tests.cases import tiny_mamba, token_batch
from tests.training.test_callback import Rows

from .calls import odd_batches, odd_loss
from .judge import ODD_VALUES, Case, fingerprint, shown
from .settings import odd_settings

_GOOD = {"strategy": "fixed", "keep_ratio": 0.5, "window": (0.0, 0.5)}
ODD_ARGUMENTS: list[dict[str, Any]] = [
    {"max_steps": 1}, {"max_steps": 2}, {"num_train_epochs": 0.0, "max_steps": -1}, {"learning_rate": 0.0},
    {"learning_rate": 1e10}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 3}, {"bf16": True},
    {"optim": "sgd"}, {"optim": "adafactor"}, {"optim": "rmsprop"}, {"warmup_steps": 10}, {"torch_compile": False},
    {"per_device_train_batch_size": 100}, {"dataloader_drop_last": True}, {"lr_scheduler_type": "constant"},
    {"gradient_checkpointing": True}, {"remove_unused_columns": False}, {"logging_steps": 1}, {"weight_decay": 1.0},
]  # fmt: skip


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Odd trainings without end.

    Args:
        draw (`random.Random`): Chooses what is odd.
        folder (`Path`): Where they write.
    """
    number = 0
    while True:
        number += 1
        kind = draw.choice(["settings", "settings", "config", "calibration batches", "loss function", "arguments"])
        config: Any = dict(_GOOD)
        rest: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        what = kind
        if kind == "settings":
            config |= odd_settings(draw, most=2)
            detail = shown(config)
        elif kind == "config":
            config = draw.choice(ODD_VALUES)
            detail = shown(config)
        elif kind == "calibration batches":
            detail, rest["calibration_batches"] = odd_batches(draw, token_batch())
            what += f", {detail}"
        elif kind == "loss function":
            detail, rest["loss_function"] = odd_loss(draw)
            what += f", {detail}"
        else:
            arguments = draw.choice(ODD_ARGUMENTS)
            detail = shown(arguments)
        model = tiny_mamba()
        run = partial(_train, model, folder / str(number), config, rest, arguments)
        yield Case(what, detail, run, partial(fingerprint, model), partial(_require_sound, model, folder / str(number)))


def _train(model: Any, folder: Path, config: Any, rest: dict[str, Any], arguments: dict[str, Any]) -> None:
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0, "learning_rate": 1e-3,
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=Rows(token_batch(batch=12)),
        callbacks=[CompreSSMCallback(config, **rest)],
    )
    trainer.train()
    trainer.save_model()


def _require_sound(model: Any, folder: Path, result: Any) -> None:
    """All layers have one size, and the folder's history knows it."""
    sizes = {layer.state_size for layer in find_layers(model)}
    assert len(sizes) == 1, f"the layers have sizes {sizes}"
    records = read_history(folder)
    cuts = [record for record in records if record.outcome == "cut"]
    assert model.config.state_size in sizes, "config and layers differ"
    assert bool(cuts) or sizes == {8}, "a cut without a record"
    assert all(torch.is_tensor(parameter) for parameter in model.parameters())
