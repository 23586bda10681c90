"""Checkpoints with faults, from which the real Trainer resumes a run under compression."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, read_history
from hf_compressm.architectures import find_layers
from tests.cases import tiny_mamba, token_batch
from tests.training.test_callback import Rows

from .files import damaged
from .judge import Case, fingerprint, with_odd_value

_CUTS = {"strategy": "fixed", "keep_ratio": 0.5, "window": (0, 4), "interval": 2}
RUNS = {
    "two cuts": CompreSSMConfig(**_CUTS),
    # A tolerance that no cut passes by: the cut before the checkpoint is pending there.
    "a cut to be judged": CompreSSMConfig(
        **_CUTS, rollback_metric="eval_loss", rollback_tolerance=100.0, rollback_after=1
    ),
}


def _trainer(folder: Path, config: CompreSSMConfig) -> Trainer:
    judged = config.judged_by_evaluation
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=0, learning_rate=1e-3, logging_steps=1,
        eval_strategy="steps" if judged else "no", eval_steps=100,
    )  # fmt: skip
    rows = Rows(token_batch(batch=20))
    return Trainer(
        tiny_mamba(), arguments, train_dataset=rows, eval_dataset=rows if judged else None,
        callbacks=[CompreSSMCallback(config)],
    )  # fmt: skip


def _interrupted(folder: Path, name: str) -> Path:
    """The output folder of a run that ended after its checkpoint of step 2."""
    path = folder / name.replace(" ", "_")
    if not path.exists():
        _trainer(path, RUNS[name]).train()
        for later in path.glob("checkpoint-*"):
            if later.name != "checkpoint-2":
                shutil.rmtree(later)
    return path


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Faulty checkpoints without end.

    Args:
        draw (`random.Random`): Chooses the fault.
        folder (`Path`): Where runs may be written.
    """
    number = 0
    while True:
        number += 1
        name = draw.choice(list(RUNS))
        path = folder / "faulty" / str(number)
        shutil.copytree(_interrupted(folder, name), path)
        checkpoint = path / "checkpoint-2"
        if draw.random() < 0.5:
            file = checkpoint / "trainer_state.json"
            fault = f"entry of the callback, {_with_odd_record(draw, file)}"
        else:
            file = draw.choice(sorted(file for file in checkpoint.iterdir() if file.is_file()))
            fault = damaged(draw, file)
        config = draw.choice([RUNS[name], RUNS[name], CompreSSMConfig(strategy="fixed", window=(0, 4))])
        trainer = _trainer(path, config)
        place = draw.choice([True, str(checkpoint)])
        # An incomplete checkpoint is set aside under another name, and stays as it was.
        files = sorted(each for each in path.rglob("*") if each.is_file() and "checkpoint-2" in str(each.parent))
        yield Case(
            f"{name}: {file.name}, {fault}",
            f"{path}, resume_from_checkpoint={place}",
            partial(trainer.train, resume_from_checkpoint=place),
            partial(_contents, files),
            partial(_require_sound, trainer, path),
            # Files of the Trainer are read by the Trainer.
            own=(Exception,),
            own_places=("/transformers/", "/safetensors/", "/torch/"),
        )


def _contents(files: list[Path]) -> str:
    return fingerprint(*(file.read_bytes() for file in files if file.is_file()))


def _with_odd_record(draw: random.Random, file: Path) -> str:
    state = json.loads(file.read_text(encoding="utf-8"))
    saved = state["stateful_callbacks"]
    saved["CompreSSMCallback"], fault = with_odd_value(saved["CompreSSMCallback"], draw)
    file.write_text(json.dumps(state), encoding="utf-8")
    return fault


def _require_sound(trainer: Trainer, folder: Path, result: Any) -> None:
    """The run came to its end, and model, configuration and history have the same sizes."""
    sizes = {layer.state_size for layer in find_layers(trainer.model)}
    assert trainer.state.global_step == 5, "the run ended early"
    assert sizes == {trainer.model.config.state_size}, f"the layers have sizes {sizes}"
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters()), "a weight is not finite"
    seen = [record for record in read_history(folder) if record.layers]
    assert {layer.size_after for layer in seen[-1].layers} == sizes, "history and layers differ"
