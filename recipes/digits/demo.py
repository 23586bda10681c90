"""
A Mamba whose state shrinks while the plain Trainer trains it, on real data and with no download.

    python recipes/digits/demo.py [--output-dir demo_output] [--steps 750] [--tolerance 0.03] [--seed 0] [--quiet]

Trains the same model twice, without and with the callback, prints one table, draws the spectra, and has a process that
never imports hf_compressm load the saved folder with stock transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from data import PIXELS, VOCABULARY, augmented, digit_sequences
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, Spectrum, fast_cpu_scan

STOCK_PROCESS = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, tokens = sys.argv[1], load_file(sys.argv[2])["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    predictions = torch.cat([model(part, use_cache=False).logits[:, -1].argmax(-1) for part in tokens.split(120)])
assert "hf_compressm" not in sys.modules
found = {"class": type(model).__name__, "state_size": model.config.state_size}
print(json.dumps({**found, "predictions": predictions.tolist()}))
"""


class StepTimer(TrainerCallback):
    """Notes how long each training step takes, without what other callbacks do at its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)


@torch.no_grad()
def predictions(model: MambaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The token that the model predicts after the last pixel, `(images,)`."""
    model.eval()
    return torch.cat([model(part, use_cache=False).logits[:, -1].argmax(-1) for part in tokens.split(120)])


def train(options: argparse.Namespace, callbacks: list[TrainerCallback], folder: Path) -> dict:
    """One training run with the plain Trainer; returns the model, its accuracy and its timings."""
    set_seed(options.seed)
    train_set, test_set = digit_sequences()
    train_set.set_transform(augmented)
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=options.state_size,
            time_step_rank=4,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    timer = StepTimer()
    args = TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        warmup_steps=options.steps // 20,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        logging_steps=options.steps // 6,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=train_set, callbacks=[timer, *callbacks])
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(folder)
    tokens, classes = test_set["input_ids"][:][:, :PIXELS], test_set["labels"][:][:, PIXELS]
    predicted = predictions(model, tokens)
    return {
        "model": model,
        "tokens": tokens,
        "predicted": predicted,
        "accuracy": (predicted == classes).float().mean().item(),
        "seconds": seconds,
        "step_seconds": timer.seconds,
        "parameters": model.num_parameters(),
    }


def load_with_stock_transformers(folder: Path, tokens: torch.Tensor) -> dict:
    """Load a folder in a new process that never imports hf_compressm, and return what it predicts."""
    path = folder.parent / "test_tokens.safetensors"
    save_file({"tokens": tokens.contiguous()}, path)
    command = [sys.executable, "-c", STOCK_PROCESS, str(folder), str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_table(console: Console, full: dict, small: dict, record, cut_step: int) -> None:
    """One table: the uncompressed run beside the compressed one, before and after its cut."""
    before, after = small["step_seconds"][5:cut_step], small["step_seconds"][cut_step + 5 :]
    table = Table(title="Mamba on 8x8 digits read pixel by pixel, plain Trainer, CPU")
    for column in ("", "uncompressed", "with CompreSSMCallback"):
        table.add_column(column, justify="left" if not column else "right")
    layer = record.layers[0]
    steps = statistics.median(before), statistics.median(after)
    table.add_row("state size", f"{full['model'].config.state_size}", f"{layer.size_before} -> {layer.size_after}")
    table.add_row("parameters", f"{full['parameters']:,}", f"{record.parameters_before:,} -> {small['parameters']:,}")
    table.add_row("test accuracy (class token)", f"{full['accuracy']:.2%}", f"{small['accuracy']:.2%}")
    table.add_row(
        "seconds per step (median)",
        f"{statistics.median(full['step_seconds'][5:]):.4f}",
        f"{steps[0]:.4f} -> {steps[1]:.4f}",
    )
    table.add_row("time spent on the cut", "", f"{record.seconds:.2f} s = {record.seconds / steps[0]:.1f} steps")
    table.add_row("calibration loss at the cut", "", f"{record.loss_before:.4f} -> {record.loss_after:.4f}")
    ratio = full["seconds"] / small["seconds"]
    table.add_row("total training time", f"{full['seconds']:.1f} s", f"{small['seconds']:.1f} s ({ratio:.2f}x faster)")
    console.print(table)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bars()
    console, remarks = Console(width=100), Console(width=100, quiet=options.quiet)
    # The Trainer prints its log, and the callback its lines.
    hushed = contextlib.redirect_stdout(io.StringIO()) if options.quiet else contextlib.nullcontext()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    with fast_cpu_scan(), hushed:
        remarks.print("1. The uncompressed run, for comparison")
        full = train(options, [], options.output_dir / "uncompressed")
        remarks.print("2. The same run with the callback")
        callback = CompreSSMCallback(CompreSSMConfig(tolerance=options.tolerance, window=(0.0, 0.1)))
        small = train(options, [callback], options.output_dir / "compressed")

    for split, rows in zip(("train", "test"), digit_sequences()):
        rows.to_parquet(options.output_dir / f"{split}.parquet")

    cuts = [record for record in callback.records if record.outcome == "cut"]
    if not cuts:
        raise SystemExit(f"nothing was cut: {callback.records[-1].summary()}")
    print_table(console, full, small, cuts[0], cuts[0].step)
    picture = options.output_dir / "spectrum.png"
    Spectrum.from_record(cuts[0]).plot(picture, tolerance=options.tolerance)
    remarks.print(f"The spectrum of every layer before the cut: {picture}")

    stock = load_with_stock_transformers(options.output_dir / "compressed", small["tokens"])
    same = sum(a == b for a, b in zip(stock["predictions"], small["predicted"].tolist()))
    remarks.print(
        f"A new process loaded {options.output_dir / 'compressed'} as stock {stock['class']} with state size "
        f"{stock['state_size']}, without hf_compressm: {same} of {len(stock['predictions'])} predictions are the same.",
        soft_wrap=True,
    )
    if same != len(stock["predictions"]):
        raise SystemExit("the reloaded model predicts something else")


if __name__ == "__main__":
    main()
