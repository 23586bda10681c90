"""What the benchmarks share: fair timing, the line that says where figures come from, and tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import MambaConfig, MambaForCausalLM

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numba", "mambapy")


def make_mamba(state_size: int, hidden_size: int = 32, layers: int = 2, vocabulary: int = 27, **overrides):
    """A stock causal Mamba; the defaults are the benchmark model of 64 channels."""
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            state_size=state_size,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **overrides,
        )
    )


def token_batch(batch: int, length: int, vocabulary: int = 27) -> dict[str, torch.Tensor]:
    """Random tokens with themselves as labels."""
    tokens = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that does one step: forward pass, backward pass, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def median_seconds(functions: Sequence[Callable[[], None]], repeats: int, warm_up: int = 1) -> list[float]:
    """
    Median time of each function, the functions taking turns so that a change of the machine's speed meets all alike.

    Args:
        functions (`Sequence[Callable]`): What is timed.
        repeats (`int`): Timed calls of each.
        warm_up (`int`, *optional*, defaults to 1): Untimed calls of each before that.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(warm_up + repeats):
        for function, collected in zip(functions, times):
            start = time.perf_counter()
            function()
            if turn >= warm_up:
                collected.append(time.perf_counter() - start)
    return [statistics.median(collected) for collected in times]


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as the argument of the next call; transformers has changed its name."""
    name = next(name for name in ("cache", "cache_params", "past_key_values") if output.get(name) is not None)
    return {name: output[name]}


def provenance() -> str:
    """The command, the machine and the versions behind a table."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    command = " ".join(["python", f"recipes/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"`{command}`; {_processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_result(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: object,
    note: str = "",
    made_by: str | None = None,
    folder: Path = RESULTS,
) -> None:
    """
    Write a table to `results/NAME.md` and its figures to `results/NAME.json`, and print the table.

    Args:
        name (`str`): Name of the two files.
        title (`str`): Heading of the table.
        header (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[str]]`): The cells.
        figures (`object`): What the cells were made from, for JSON.
        note (`str`, *optional*): What a reader has to know of how it was measured.
        made_by (`str`, *optional*): The command, the machine and the versions; those of this process when unset.
        folder (`Path`, *optional*): Where to write, when not to `results`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)
    text = f"# {title}\n\n{table}\n\n{note + chr(10) + chr(10) if note else ''}Made by {made_by or provenance()}.\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\n{title}\n{table}", flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows how often to repeat."""
    made = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    made.add_argument("--repeats", type=int, default=7, help="timed repetitions of each figure")
    return made
