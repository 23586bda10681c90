"""
Training step on the CPU beside its floor: the time that the matrix products and norms of the model take alone.

Four ways to take the same step are timed in one run: transformers' own code, mambapy's parallel scan (what transformers
runs with `use_mambapy=True`), this library's kernels, and the floor, whose models are in `floor_models.py`. Where this
library has kernels for the single steps of generation, tokens are decoded as well, with and without them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from common import RESULTS, cache_of, median_seconds, parser, token_batch, training_step, write_result
from floor_models import FAMILIES, Family, products_alone
from torch import nn

from hf_compressm import fast_cpu_scan

# Width: layers, and sequences times steps.
MODELS = {32: (2, (64, 64)), 256: (4, (8, 512)), 768: (4, (4, 512))}
DEFAULT_WIDTHS = (32, 256)
TINY = {8: (1, (2, 6))}
# Where peers are measured unless more is asked for: some of them take seconds a step.
FEW_WIDTH, FEW_STATES = 32, 64
# How many numbers the peers keep for each state of each channel at each step, about.
_PEERS_KEEP = 8
# Decoded from one prompt in each turn; the switch takes as long as a token of a small model.
_PROMPT, _DECODED, _TURNS = 8, 20, 7

Step = Callable[[], None]


def with_kernels(step: Step) -> Step:
    """The step inside of the switch."""

    def switched() -> None:
        with fast_cpu_scan():
            step()

    return switched


def fits_in_memory(state_size: int, width: int, layers: int, shape: tuple[int, int]) -> bool:
    """Whether the peers, which keep every state, can take a step."""
    numbers = _PEERS_KEEP * layers * shape[0] * shape[1] * 2 * width * state_size
    return 4 * numbers < 0.8 * psutil.virtual_memory().available


def peers_are_asked_for(state_size: int, width: int, options: Any) -> bool:
    """Whether the peers are measured at one size of a model."""
    if options.peers == "few" and not options.tiny:
        return (width, state_size) == (FEW_WIDTH, FEW_STATES)
    return options.peers != "none"


def times_of(
    family: Family, state_size: int, width: int, layers: int, shape: tuple[int, int], options: Any
) -> dict[str, float]:
    """Seconds a step of each way that is there and fits, and seconds a token where these are measured."""
    batch, sizes = token_batch(*shape), {"hidden_size": width, "layers": layers}

    def make(**settings: Any) -> nn.Module:
        torch.manual_seed(0)
        return family.make(state_size, **sizes, **settings)

    ours, floor = training_step(make(), batch), training_step(products_alone(make()), batch)
    found = median_seconds([floor, with_kernels(ours)], options.repeats, warm_up=2)
    times = dict(zip(("floor", "hf_compressm"), found))
    if family.has_steps:
        times |= seconds_a_token(make())
    if not peers_are_asked_for(state_size, width, options) or not fits_in_memory(state_size, width, layers, shape):
        return times
    steps = {"transformers": training_step(make(), batch)} if family.is_stock else {}
    if family.has_mambapy and importlib.util.find_spec("mambapy"):
        steps["mambapy"] = training_step(make(use_mambapy=True), batch)
    repeats = max(1, options.repeats // 3)
    return times | dict(zip(steps, median_seconds(list(steps.values()), repeats)))


def seconds_a_token(model: nn.Module) -> dict[str, float]:
    """Seconds for one token of one sequence after a prompt, through transformers' code and through this library's."""
    tokens = token_batch(1, _PROMPT)["input_ids"]
    model.eval()

    def decoding(with_ours: bool) -> Step:
        with torch.no_grad():
            held = cache_of(model(tokens, use_cache=True))

        def decode() -> None:
            with fast_cpu_scan(with_ours), torch.no_grad():
                for _ in range(_DECODED):
                    model(tokens[:, -1:], use_cache=True, **held)

        return decode

    found = median_seconds([decoding(False), decoding(True)], _TURNS)
    return {f"decode_{name}": seconds / _DECODED for name, seconds in zip(("transformers", "hf_compressm"), found)}


def row_of(name: str, state_size: int, times: dict[str, float], at_largest: float) -> list[str]:
    """The cells of one model at one state size."""
    ours = times["hf_compressm"]
    peers = [
        f"{times[peer] * 1e3:.0f} ms ({times[peer] / ours:.1f}x)" if peer in times else "-"
        for peer in ("transformers", "mambapy")
    ]
    stock, own = (times.get(key) for key in ("decode_transformers", "decode_hf_compressm"))
    decoded = "-" if stock is None or own is None else f"{1 / stock:.0f} -> {1 / own:.0f}"
    cells = [name, str(state_size), f"{times['floor'] * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms"]
    return [*cells, f"{ours / times['floor']:.2f}", f"{at_largest / ours:.2f}x", *peers, decoded]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time all models at all state sizes."""
    made = parser(__doc__)
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which families")
    made.add_argument("--widths", type=int, nargs="+", choices=MODELS, default=DEFAULT_WIDTHS, help="which models")
    made.add_argument("--state-sizes", type=int, nargs="+", help="states a channel, those of each family when unset")
    made.add_argument(
        "--peers", choices=("all", "few", "none"), default="few",
        help=f"where transformers and mambapy are timed: few is width {FEW_WIDTH} with N = {FEW_STATES}",
    )  # fmt: skip
    made.add_argument("--tiny", action="store_true", help="models of no use, to see that everything runs")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="where the table goes")
    options = made.parse_args(arguments)
    models = TINY if options.tiny else {width: MODELS[width] for width in options.widths}
    figures, rows = {}, []
    for family_name in options.families:
        family = FAMILIES[family_name]
        for width, (layers, shape) in models.items():
            name = f"{family_name}, {layers} layers of width {width}, batch {shape[0]} x {shape[1]}"
            sizes = sorted((4, 2) if options.tiny else options.state_sizes or family.state_sizes, reverse=True)
            found = {state_size: times_of(family, state_size, width, layers, shape, options) for state_size in sizes}
            figures[name] = {str(state_size): times for state_size, times in found.items()}
            at_largest = found[sizes[0]]["hf_compressm"]
            rows += [row_of(name, state_size, times, at_largest) for state_size, times in found.items()]
    write_result(
        "floor",
        "Training step on a CPU, beside the matrix products and norms of the model alone",
        [
            "model", "N", "floor", "ours", "ours / floor", "against the largest N", "transformers", "mambapy",
            "tokens / s decoded",
        ],
        rows,
        figures,
        "Forward, backward and AdamW; medians of interleaved repetitions. In brackets: how many times ours is faster. "
        "Tokens: of one sequence, from transformers' code to ours. A dash: there is none, not installed, not asked "
        "for, or more states to keep than there is memory.",
        folder=options.output_dir,
    )  # fmt: skip


if __name__ == "__main__":
    main()
