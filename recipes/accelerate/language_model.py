"""
A causal language model on bytes, cut while it trains; one script for one process, for several, and for several GPUs.

    python recipes/accelerate/language_model.py
    torchrun --nproc_per_node 2 recipes/accelerate/language_model.py                  # two processes on a CPU
    accelerate launch --config_file recipes/accelerate/configs/ddp.yaml recipes/accelerate/language_model.py   # GPUs
    accelerate launch --config_file recipes/accelerate/configs/fsdp2.yaml recipes/accelerate/language_model.py
    accelerate launch --config_file recipes/accelerate/configs/zero3.yaml recipes/accelerate/language_model.py

`--batch-size` is that of all processes together, so the steps see the same data whatever their number.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, train_in_segments

BYTES = 256


def text_files(given: list[str]) -> list[str]:
    """The files that the user gave, or the modules at the top of Python's standard library, which every machine has."""
    return given or sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))


def pieces(files: list[str], length: int) -> Dataset:
    """The bytes of all files, one after the other, in pieces of one length."""
    text = "\n".join(load_dataset("text", data_files=files, split="train")["text"])
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    rows = data[: len(data) // length * length].reshape(-1, length).numpy()
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def main() -> None:
    """Train, cut once, evaluate, and write the losses of every step."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data-files", nargs="+", default=[], help="text files; default: Python's standard library")
    parser.add_argument("--output-dir", type=Path, default=Path("language_model_output"))
    parser.add_argument("--losses", type=Path, help="file for the losses; default: in the output folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--state-size", type=int, default=32)
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="share of the states that the cut keeps")
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % processes:
        raise SystemExit(f"--batch-size {options.batch_size} is no multiple of the {processes} processes.")

    set_seed(0)
    data = pieces(text_files(options.data_files), options.length).train_test_split(test_size=64, seed=0)
    model_config = MambaConfig(
        vocab_size=BYTES,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        state_size=options.state_size,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size // processes,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=options.steps,
        save_strategy="no",
        report_to="none",
        seed=0,
        # Without it the Trainer does not wrap a model that several processes train on CPUs.
        use_cpu=not torch.cuda.is_available(),
    )
    # A fixed batch, split over the processes, so that the cut is the same whatever their number.
    rank = int(os.environ.get("RANK", 0))
    joint = data["train"][: options.batch_size]
    mine = {name: values.chunk(processes)[rank] for name, values in joint.items()}
    # A readout would be fitted to the data of the first process alone, so that runs in one and in two would differ.
    config = CompreSSMConfig(strategy="fixed", keep_ratio=options.keep_ratio, fit_readout=False)

    def make_trainer() -> Trainer:
        set_seed(0)
        return Trainer(
            model=MambaForCausalLM(model_config),
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            callbacks=[CompreSSMCallback(config, calibration_batches=[mine])],
        )

    trainer = train_in_segments(make_trainer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        callback = next(held for held in trainer.callback_handler.callbacks if isinstance(held, CompreSSMCallback))
        figures = {
            "processes": processes,
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "evaluation loss": next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry),
            "state size": trainer.model.config.state_size,
            "cut": callback.records[-1].summary(),
        }
        path = options.losses or options.output_dir / f"losses_{processes}.json"
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: evaluation loss {figures['evaluation loss']:.6f}, state size {figures['state size']}")


if __name__ == "__main__":
    main()
