"""
A training run end to end: uncompressed, cut in training, and small from scratch, for the same number of steps.

The text is the Python standard library's own source, which every machine with Python has; the model predicts its bytes.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import make_mamba
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig

from .session import Session

# Full and small N, layers, width, length, batch, steps, pieces of text for the test.
SETTING = (128, 16, 8, 512, 1024, 16, 300, 128)
TINY = (8, 4, 2, 16, 32, 4, 6, 4)
WINDOW = (0.0, 0.15)
_TEXT_BYTES = 8_000_000


def run(session: Session) -> None:
    """Three runs with one seed each, one after the other."""
    full, small, layers, width, length, batch_size, steps, test_pieces = TINY if session.tiny else SETTING
    disable_progress_bars()
    train, test = _pieces(length, test_pieces, 50_000 if session.tiny else _TEXT_BYTES)
    cut = CompreSSMConfig(strategy="target", target_state_size=small, window=WINDOW)
    runs = {
        f"N = {full}, uncompressed": (full, None),
        f"N = {full}, cut in training": (full, cut),
        f"N = {small} from scratch": (small, None),
    }
    rows, figures = [], {}
    arguments = (layers, width, batch_size, steps)
    for name, (n, config) in runs.items():
        found = session.attempt(name, partial(_run, session, n, config, *arguments, train, test))
        if found is None:
            continue
        figures[name] = found
        reference = next(iter(figures.values()))["seconds"]
        cut_at = f"{found['cut_seconds']:.1f} s after step {found['cut_step']}" if found["cut_step"] else ""
        rows.append(
            [
                name,
                f"{found['seconds']:.1f} s ({reference / found['seconds']:.2f}x)",
                cut_at,
                f"{found['parameters']:,}",
                f"{found['perplexity']:.4f}",
                found["sizes"],
            ]
        )
    session.write(
        "gpu_in_training",
        "One training run end to end with the plain Trainer",
        ["run", "wall clock", "the cut took", "parameters at the end", "test perplexity per byte", "final N"],
        rows,
        figures,
        f"Mamba of {layers} layers of width {width} on bytes of the Python standard library's source (files in sorted "
        f"order, the first {_TEXT_BYTES:,} bytes, the last {test_pieces} pieces of {length} kept for the test); batch "
        f"{batch_size} x {length}, {steps} steps, bf16, fused AdamW, cosine schedule; one seed. The wall clock is "
        "that of `trainer.train()`, the cut and its calibration included; two steps of the first size run before it.",
    )


def _run(
    session: Session, n: int, config: CompreSSMConfig | None, layers: int, width: int, batch_size: int, steps: int,
    train: Dataset, test: Tensor,
) -> dict[str, Any]:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _trainer(session, folder, n, layers, width, batch_size, 2, train, []).train()
        callback = CompreSSMCallback(config) if config is not None else None
        trainer = _trainer(
            session, folder, n, layers, width, batch_size, steps, train, [] if callback is None else [callback]
        )
        session.wait()
        start = time.perf_counter()
        trainer.train()
        session.wait()
        seconds = time.perf_counter() - start
    records = [] if callback is None else [record for record in callback.records if record.outcome == "cut"]
    model = trainer.model
    return {
        "seconds": seconds,
        "cut_seconds": sum(record.seconds for record in records),
        "cut_step": records[-1].step if records else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": _perplexity(session, model, test),
        "sizes": str(model.config.state_size),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _trainer(
    session: Session, folder: str, n: int, layers: int, width: int, batch_size: int, steps: int, train: Dataset,
    callbacks: list[CompreSSMCallback],
) -> Trainer:  # fmt: skip
    set_seed(0)
    model = make_mamba(n, hidden_size=width, layers=layers, vocabulary=256)
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=2e-3,
        warmup_steps=steps // 20, lr_scheduler_type="cosine", weight_decay=0.05, logging_steps=max(1, steps // 8),
        save_strategy="no", report_to="none", seed=0, bf16=True, optim="adamw_torch_fused", disable_tqdm=True,
        use_cpu=session.device.type == "cpu",
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=train, callbacks=callbacks)


@torch.no_grad()
def _perplexity(session: Session, model: torch.nn.Module, test: Tensor) -> float:
    model.eval()
    losses = [
        model(input_ids=part, labels=part, use_cache=False).loss * len(part)
        for part in test.to(session.device).split(16)
    ]
    return float((torch.stack(losses).sum() / len(test)).exp())


def _pieces(length: int, test_pieces: int, size: int) -> tuple[Dataset, Tensor]:
    """The text in pieces of one length: those for the training, and those for the test."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py")):
        if "packages" not in path.parts[-2] and len(text) < size:
            text += path.read_bytes()
    text = text[:size]
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    pieces = data[: len(data) // length * length].view(-1, length)
    # What is tested should not all come from the files at the end of the alphabet.
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    train = pieces[:-test_pieces].numpy()
    rows = Dataset.from_dict({"input_ids": train, "labels": train}).with_format("torch")
    return rows, pieces[-test_pieces:]
