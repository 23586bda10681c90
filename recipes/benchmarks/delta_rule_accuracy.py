"""Accuracy of gated DeltaNet right after its key dimension is cut, with no training after it, by how it is cut."""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import scipy.linalg
import torch
from common import parser, write_result
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from hf_compressm import CompreSSMConfig, fast_cpu_scan
from hf_compressm.architectures import all_changes, find_layers
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.systems import Truncation, selection_truncation

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import GREY_LEVELS, PIXELS, VOCABULARY, augmented, digit_sequences  # noqa: E402

N, KEPT = 64, (32, 16, 8, 4)


class Vectors:
    """Keeps the keys and queries of a layer, after their norm: `(key heads, steps, N)`."""

    def observe(self, inputs, output):
        """Keep those of a forward pass."""
        self.keys, self.queries = (x.detach().double().flatten(0, 1).transpose(0, 1) for x in (inputs.B, inputs.C))
        return output


def channels_by_squares(vectors: Vectors, r: int) -> Truncation:
    """The channels with the largest product of the mean squares of keys and of queries."""
    return selection_truncation(vectors.keys.square().mean(1) * vectors.queries.square().mean(1), r)


def channels_by_pivoted_qr(vectors: Vectors, r: int) -> Truncation:
    """The first pivots of a rank-revealing QR of the rows of keys and queries (after Nazari and Rusch, 2026)."""
    rows = torch.cat([vectors.keys, vectors.queries / vectors.queries.square().mean((1, 2), keepdim=True).sqrt()], 1)
    pivots = [scipy.linalg.qr(part.numpy(), mode="r", pivoting=True)[1][:r] for part in rows]
    return Truncation.from_indices(torch.stack([torch.tensor(sorted(p)).long() for p in pivots]), N)


def eigenvectors_of(name: str) -> Callable[[Vectors, int], Truncation]:
    """The leading eigenvectors of the covariance of keys or of queries."""

    def truncation(vectors: Vectors, r: int) -> Truncation:
        rows = getattr(vectors, name)
        U = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., -r:]
        return Truncation(T=U, W=U.clone())

    return truncation


def random_channels(vectors: Vectors, r: int) -> Truncation:
    """Random channels."""
    generator = torch.Generator().manual_seed(0)
    return selection_truncation(torch.zeros(vectors.keys.shape[::2]), r, "random", generator)


OURS = {
    "orthonormal, mixed": "orthonormal",
    "interpolative, mixed": "interpolative",
    "channels, selection": "selection",
}
OTHERS = {
    "channels, random": random_channels,
    "channels, E[k^2] E[q^2]": channels_by_squares,
    "channels, pivoted QR of keys and queries": channels_by_pivoted_qr,
    "eigenvectors of the keys, mixed": eigenvectors_of("keys"),
    "eigenvectors of the queries, mixed": eigenvectors_of("queries"),
}


def trained(seed: int, steps: int, rows: dict[str, Tensor]) -> Qwen3NextForCausalLM:
    """Two layers of two heads, trained to tell the digit and, a little, the next pixel."""
    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, layer_types=["linear_attention"] * 2,
            mlp_only_layers=[0, 1], intermediate_size=128, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=N, linear_value_head_dim=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            use_cache=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        picked = torch.randint(0, len(rows["input_ids"]), (64,))
        batch = augmented({name: value[picked] for name, value in rows.items()})
        tokens = torch.stack(batch["input_ids"])
        logits = model(input_ids=tokens).logits
        next_pixel = nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[:, 1:-1].flatten())
        loss = nn.functional.cross_entropy(logits[:, -2], tokens[:, -1]) + 0.2 * next_pixel
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor) -> float:
    """The share of test images whose class token is told."""
    logits = model(input_ids=tokens[:, :PIXELS]).logits[:, -1, GREY_LEVELS:]
    return (logits.argmax(-1) + GREY_LEVELS == tokens[:, PIXELS]).float().mean().item()


def accuracy_after(model: nn.Module, truncations: list[Truncation], tokens: Tensor, mixed: bool) -> float:
    """The accuracy of a copy that is cut; channels that are chosen behind the norm are combined there."""
    smaller = copy.deepcopy(model)
    layers = find_layers(smaller)
    if mixed:
        truncations = [Truncation(T=each.T, W=each.W) for each in truncations]
    reductions = [layer.reduce(truncation) for layer, truncation in zip(layers, truncations)]
    ModelChange(smaller, reductions, all_changes(smaller, layers, reductions)).commit()
    return accuracy(smaller.eval(), tokens)


def main() -> None:
    """Train on the digits, cut copies in every way, and test each copy at once."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="models to train")
    options.add_argument("--steps", type=int, default=900, help="training steps of each")
    options = options.parse_args()
    train_set, test_set = digit_sequences()
    rows = {name: torch.as_tensor(train_set[name][:]) for name in ("input_ids", "labels")}
    test = torch.as_tensor(test_set["input_ids"][:])
    batch = {name: value[:64] for name, value in rows.items()}
    base, found = [], {name: {kept: [] for kept in KEPT} for name in (*OURS, *OTHERS)}
    with fast_cpu_scan():
        for seed in range(options.seeds):
            model = trained(seed, options.steps, rows)
            base.append(accuracy(model, test))
            layers, vectors = find_layers(model), []
            for layer in layers:
                vectors.append(Vectors())
                with layer.observed(vectors[-1]), torch.no_grad():
                    model(input_ids=batch["input_ids"])
            gramians = calibrate(model, layers, [batch], progress=False).gramians
            for kept in KEPT:
                for name, reductor in OURS.items():
                    cuts = [gramians[layer.name].truncate(kept, reductor, CompreSSMConfig()) for layer in layers]
                    found[name][kept].append(accuracy_after(model, cuts, test, mixed="mixed" in name))
                for name, method in OTHERS.items():
                    cuts = [method(each, kept) for each in vectors]
                    found[name][kept].append(accuracy_after(model, cuts, test, mixed="mixed" in name))
    write_result(
        "delta_rule_accuracy",
        f"Test accuracy right after cutting d_k = {N} of gated DeltaNet (uncut: {_mean_and_spread(base)})",
        ["method", *(f"r = {kept}" for kept in KEPT)],
        [[name, *(_mean_and_spread(found[name][kept]) for kept in KEPT)] for name in found],
        {"uncut": base, **found},
        f"Two layers of Qwen3-Next with two heads on 8x8 digits read pixel by pixel, {options.steps} steps, "
        f"{options.seeds} seeds, 360 test images; mean and standard deviation over seeds. Calibrated on 64 training "
        "images. Channels are those that a stock class keeps, before the norm.",
    )


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


if __name__ == "__main__":
    main()
