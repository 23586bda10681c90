"""
Training step of a Mamba-2 on the CPU with two scans, transformers' and ours, and what one cut costs in such steps.

The model has two layers of 128 channels in four heads; a batch has 2048 tokens. The cut reads one batch of that size.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from common import median_seconds, parser, token_batch, training_step, write_result
from transformers import Mamba2Config, Mamba2ForCausalLM

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

VOCABULARY = 27
TOKENS = 2048
# Length of the sequences, state size, and the chunk of the config (256 is its default).
SETTINGS = ((64, 64, 256), (64, 64, 64), (256, 64, 256), (256, 128, 64), (1024, 128, 256))
CUT = CompreSSMConfig(strategy="fixed", keep_ratio=0.25, reductor="selection", stock=True)


def make_mamba2(state_size: int, chunk_size: int) -> Mamba2ForCausalLM:
    """A stock causal Mamba-2."""
    torch.manual_seed(0)
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=state_size, num_heads=4, head_dim=32,
            n_groups=1, chunk_size=chunk_size, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def fast(function: Callable[[], object]) -> Callable[[], None]:
    """The function inside of the switch."""

    def switched() -> None:
        with fast_cpu_scan():
            function()

    return switched


def gradient_difference(model: Mamba2ForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient between the two scans, relative to its parameter's largest."""
    gradients = []
    for enabled in (False, True):
        twin = copy.deepcopy(model).train()
        with fast_cpu_scan(enabled=enabled):
            twin(**batch, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients))


def cut_seconds(model: Mamba2ForCausalLM, batch: dict[str, torch.Tensor], repeats: int) -> float:
    """Median time of a whole cut: Gramians, spectrum, selection, new weights, and the loss after it."""
    times = []
    for _ in range(1 + repeats):
        twin = copy.deepcopy(model)
        start = time.perf_counter()
        compress(twin, [batch], CUT, progress=False)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    """Time both scans in each setting, compare their gradients, and time a cut."""
    options = parser(__doc__).parse_args()
    figures, rows = [], []
    for length, state_size, chunk_size in SETTINGS:
        batch, model = token_batch(TOKENS // length, length), make_mamba2(state_size, chunk_size)
        steps = [training_step(copy.deepcopy(model), batch), fast(training_step(copy.deepcopy(model), batch))]
        stock, ours = median_seconds(steps, options.repeats, warm_up=2)
        difference, cut = gradient_difference(model, batch), cut_seconds(model, batch, options.repeats)
        figures.append(
            {"length": length, "state_size": state_size, "chunk_size": chunk_size, "transformers": stock,
             "hf_compressm": ours, "gradient_difference": difference, "cut": cut}
        )  # fmt: skip
        rows.append(
            [
                str(length),
                str(state_size),
                str(chunk_size),
                f"{stock * 1e3:.0f} ms",
                f"{ours * 1e3:.0f} ms",
                f"{stock / ours:.1f}x",
                f"{difference:.0e}",
                f"{cut * 1e3:.0f} ms",
                f"{cut / ours:.1f}",
            ]
        )
    write_result(
        "multi_head_scan",
        "Training step of a 2-layer Mamba-2 on a CPU by scan, and the cost of a cut",
        [
            "length",
            "N",
            "chunk_size",
            "transformers",
            "hf_compressm",
            "factor",
            "gradients differ by",
            "a cut",
            "in steps",
        ],
        rows,
        figures,
        "Forward, backward and fused AdamW; 128 channels, 2048 tokens a batch; medians of interleaved repetitions. "
        "transformers pads a sequence to a multiple of `chunk_size`, whose default is 256. A cut is everything that "
        "`compress` does with one batch: Gramians from states and adjoint states, selection, new weights, the loss "
        "after it; in steps of the faster scan.",
    )


if __name__ == "__main__":
    main()
