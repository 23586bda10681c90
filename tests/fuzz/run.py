"""
Tries odd inputs in every area and writes what they did to `tried.md`.

    python -m tests.fuzz.run [--count 1200] [--seed 0] [--areas files ...]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

import hf_compressm

from .fuzz import AREAS, Tried, tried

TABLE = Path(__file__).with_name("tried.md")


def table(results: dict[str, Tried], command: str) -> str:
    """
    The page with what was tried.

    Args:
        results (`dict[str, Tried]`): By area.
        command (`str`): What made them.
    """
    total = sum(result.count for result in results.values())
    lines = [
        "# Odd inputs that were tried",
        "",
        f"{total:,} inputs drawn from a seed. Each gave an error of a known type whose message says something, and "
        "changed nothing, or worked, and the result was sound. Errors that are not this library's are those of the "
        "user's model, loss function or disk, which pass through.",
        "",
    ]
    for area, result in results.items():
        lines += [
            f"## {area}: {result.count}",
            "",
            "| input | tried | worked | refused by |",
            "| --- | --- | --- | --- |",
        ]
        for kind, counter in sorted(result.outcomes.items()):
            refused = Counter({name: count for name, count in counter.items() if name != "worked"})
            by = ", ".join(f"{name} {count}" for name, count in refused.most_common())
            lines.append(f"| {kind} | {counter.total()} | {counter['worked']} | {by} |")
        lines.append("")
    lines.append(
        f"Made by `{command}`; Python {sys.version.split()[0]}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, hf_compressm {hf_compressm.__version__}."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try, print what broke the rule, and write the table where nothing did."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--count", type=int, default=1200, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), default=list(AREAS))
    options = parser.parse_args()
    results = {area: tried(area, options.count // len(options.areas), options.seed) for area in options.areas}
    broken = [line for result in results.values() for line in result.broken]
    print("\n".join(broken))
    for area, result in results.items():
        print(f"{area}: {result.count} inputs, {len(result.broken)} broke the rule, {result.seconds:.0f} s")
    if not broken and options.areas == list(AREAS):
        command = f"python -m tests.fuzz.run --count {options.count} --seed {options.seed}"
        TABLE.write_text(table(results, command), encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
