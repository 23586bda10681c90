"""
Training step of a Mamba on the CPU beside its floor: the time that its matrix products and norms take alone.

Four ways to take the same step are timed in one run: transformers' own loop over time, mambapy's parallel scan (what
transformers runs with `use_mambapy=True`), this library's kernels, and the floor. The floor is the same model in which
everything between the projections of a mixer is left out: each projection gets a tensor that lies ready, forward and
backward, so that all of its products are computed and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from common import RESULTS, make_mamba, median_seconds, parser, token_batch, training_step, write_result
from torch import Tensor, nn

from hf_compressm import fast_cpu_scan

STATE_SIZES = (128, 64, 16, 8)
# Width: layers, and sequences times steps.
MODELS = {32: (2, (64, 64)), 256: (4, (8, 512)), 768: (4, (4, 512))}
TINY = {8: (1, (2, 6))}
# How many numbers the peers keep for each state of each channel at each step, about.
_PEERS_KEEP = 8

Step = Callable[[], None]


@functools.cache
def _ready(shape: tuple[int, ...]) -> Tensor:
    """A tensor that lies ready."""
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


class _LeftOut(torch.autograd.Function):
    """Takes tensors and gives one of another shape, at no cost, in both directions."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.shapes = [tuple(tensor.shape) for tensor in inputs]
        return _ready(shape).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_ready(shape) for shape in ctx.shapes)


def projections_alone(mixer: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    """The forward pass of a mixer without anything between its projections."""
    shape = (*hidden_states.shape[:2], mixer.intermediate_size)
    projected = mixer.in_proj(hidden_states)
    x = _LeftOut.apply(shape, projected)
    parameters = mixer.x_proj(x)
    low_rank = _LeftOut.apply((*shape[:2], mixer.time_step_rank), parameters)
    time_step = F.linear(low_rank, mixer.dt_proj.weight)
    return mixer.out_proj(_LeftOut.apply(shape, time_step))


def floor_model(state_size: int, **sizes: int) -> nn.Module:
    """The benchmark model, its mixers without all that is no matrix product."""
    model = make_mamba(state_size, **sizes)
    for block in model.backbone.layers:
        block.mixer.forward = functools.partial(projections_alone, block.mixer)
    return model


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


def times_of(state_size: int, width: int, layers: int, shape: tuple[int, int], options: Any) -> dict[str, float]:
    """Seconds a step of each way that is there and fits."""
    batch, sizes = token_batch(*shape), {"hidden_size": width, "layers": layers}
    ours = with_kernels(training_step(make_mamba(state_size, **sizes), batch))
    floor = training_step(floor_model(state_size, **sizes), batch)
    times = dict(zip(("floor", "hf_compressm"), median_seconds([floor, ours], options.repeats, warm_up=2)))
    if not options.peers or not fits_in_memory(state_size, width, layers, shape):
        return times
    steps = {"transformers": training_step(make_mamba(state_size, **sizes), batch)}
    if importlib.util.find_spec("mambapy"):
        steps["mambapy"] = training_step(make_mamba(state_size, use_mambapy=True, **sizes), batch)
    repeats = max(1, options.repeats // 3)
    return times | dict(zip(steps, median_seconds(list(steps.values()), repeats)))


def row_of(name: str, state_size: int, times: dict[str, float], at_largest: float) -> list[str]:
    """The cells of one model at one state size."""
    ours = times["hf_compressm"]
    peers = [
        f"{times[peer] * 1e3:.0f} ms ({times[peer] / ours:.0f}x)" if peer in times else "-"
        for peer in ("transformers", "mambapy")
    ]
    cells = [name, str(state_size), f"{times['floor'] * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms"]
    return [*cells, f"{ours / times['floor']:.2f}", f"{at_largest / ours:.2f}x", *peers]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time all models at all state sizes."""
    made = parser(__doc__)
    made.add_argument("--widths", type=int, nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    made.add_argument("--state-sizes", type=int, nargs="+", default=STATE_SIZES, help="states a channel")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="only ours and the floor")
    made.add_argument("--tiny", action="store_true", help="a model of no use, to see that everything runs")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="where the table goes")
    options = made.parse_args(arguments)
    models = TINY if options.tiny else {width: MODELS[width] for width in options.widths}
    figures, rows = {}, []
    for width, (layers, shape) in models.items():
        name = f"{layers} layers of width {width}, batch {shape[0]} x {shape[1]}"
        sizes = sorted((4, 2) if options.tiny else options.state_sizes, reverse=True)
        found = {state_size: times_of(state_size, width, layers, shape, options) for state_size in sizes}
        figures[name] = {str(state_size): times for state_size, times in found.items()}
        at_largest = found[sizes[0]]["hf_compressm"]
        rows += [row_of(name, state_size, times, at_largest) for state_size, times in found.items()]
    write_result(
        "floor",
        "Training step of a Mamba on a CPU, beside its matrix products and norms alone",
        ["model", "N", "floor", "ours", "ours / floor", "against the largest N", "transformers", "mambapy"],
        rows,
        figures,
        "Forward, backward and AdamW; medians of interleaved repetitions. In brackets: how many times ours is faster. "
        "A dash: not installed, not asked for, or more states to keep than there is memory.",
        folder=options.output_dir,
    )


if __name__ == "__main__":
    main()
