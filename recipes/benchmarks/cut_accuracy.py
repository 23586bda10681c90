"""Accuracy right after a cut, with no training after it, by how the kept states are found."""

from __future__ import annotations

import copy
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import parser, write_result

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import PIXELS, digit_sequences  # noqa: E402
from demo import predictions, train  # noqa: E402

KEPT = (32, 16, 8, 4)
METHODS = {
    "interpolative, folded": {},
    "selection, greedy": {"reductor": "selection"},
    "selection, diagonal Hankel score": {"reductor": "selection", "selection_score": "hankel"},
    "selection, sum h^2 C^2 (GHOST)": {"reductor": "selection", "selection_score": "readout_energy"},
    "selection, averaged LTI": {"reductor": "selection", "selection_score": "hankel", "gramians": "averaged"},
    "selection, random": {"reductor": "selection", "selection_rule": "random"},
}


def main() -> None:
    """Train N = 64 on the digits, cut copies of it in every way, and test each copy at once."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="models to train")
    options.add_argument("--steps", type=int, default=600, help="training steps of each")
    options = options.parse_args()
    train_set, test_set = digit_sequences()
    tokens, classes = test_set["input_ids"][:][:, :PIXELS], test_set["labels"][:][:, PIXELS]
    batch = {name: train_set[name][:128] for name in ("input_ids", "labels")}
    accuracies = {name: {kept: [] for kept in KEPT} for name in METHODS}
    base = []
    with fast_cpu_scan(), TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            run = Namespace(seed=seed, steps=options.steps, state_size=64)
            model = train(run, [], Path(folder))["model"]
            base.append((predictions(model, tokens) == classes).float().mean().item())
            for name, settings in METHODS.items():
                for kept in KEPT:
                    config = CompreSSMConfig(strategy="fixed", keep_ratio=kept / 64, seed=seed, **settings)
                    smaller = copy.deepcopy(model)
                    compress(smaller, [batch], config, progress=False)
                    found = (predictions(smaller, tokens) == classes).float().mean().item()
                    accuracies[name][kept].append(found)
    rows = [[name, *(_mean_and_spread(accuracies[name][kept]) for kept in KEPT)] for name in METHODS]
    write_result(
        "cut_accuracy",
        f"Test accuracy right after cutting N = 64 (uncut: {_mean_and_spread(base)})",
        ["method", *(f"r = {kept}" for kept in KEPT)],
        rows,
        {"uncut": base, **accuracies},
        f"Stock 2-layer Mamba on 8x8 digits read pixel by pixel, {options.steps} steps, {options.seeds} seeds, 360 "
        "test images; mean and standard deviation over seeds. Calibrated on 128 training images.",
    )


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
