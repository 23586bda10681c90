"""Accuracy of linear attention right after its key dimension is cut, with no training after it, by how it is cut."""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import scipy.linalg
import torch
from common import parser, write_result
from torch import Tensor, nn
from transformers import (
    MiniMaxConfig,
    MiniMaxForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from hf_compressm import CompreSSMConfig, fast_cpu_scan
from hf_compressm.architectures import all_changes, find_layers
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.systems import Truncation, selection_truncation

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import GREY_LEVELS, PIXELS, VOCABULARY, augmented, digit_sequences  # noqa: E402

N = 64


class Vectors:
    """Keeps the keys and queries of a layer, as its recurrence gets them: `(key heads, steps, N)`."""

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


def gated_delta_net() -> PreTrainedModel:
    """Qwen3-Next, two heads."""
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, layer_types=["linear_attention"] * 2,
            mlp_only_layers=[0, 1], intermediate_size=128, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=N, linear_value_head_dim=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            use_cache=False,
        )
    )  # fmt: skip


def minimax() -> PreTrainedModel:
    """MiniMax, two heads, one expert."""
    return MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, layer_types=["linear_attention"] * 2,
            intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=N, num_local_experts=1,
            num_experts_per_tok=1, use_cache=False,
        )
    )  # fmt: skip


def xlstm() -> PreTrainedModel:
    """xLSTM, eight heads."""
    return xLSTMForCausalLM(
        xLSTMConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=8, qk_dim_factor=8.0,
            ffn_proj_factor=2.0, chunk_size=32, autocast_kernel_dtype="float32", use_cache=False,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """
    A family of the tables.

    Args:
        result (`str`): The name of its table.
        title (`str`): What the title calls it.
        build (`Callable`): Makes a model of two layers.
        kept (`tuple[int, ...]`): What N is cut to.
        ours (`dict[str, str]`): This library's reductors, by the names of their rows.
        note (`str`): What a reader has to know of the model, and of channels.
    """

    result: str
    title: str
    build: Callable[[], PreTrainedModel]
    kept: tuple[int, ...]
    ours: dict[str, str]
    note: str


_BALANCED = {
    "balanced": "balanced", "orthonormal": "orthonormal", "interpolative": "interpolative", "channels": "selection",
}  # fmt: skip
FAMILIES = {
    "gated_delta_net": Family(
        "delta_rule_accuracy", "gated DeltaNet", gated_delta_net, (32, 16, 8, 4),
        {
            "orthonormal, mixed": "orthonormal",
            "interpolative, mixed": "interpolative",
            "channels, selection": "selection",
        },
        "Two layers of Qwen3-Next with two heads. Channels are those that a stock class keeps, before the norm.",
    ),
    "minimax": Family(
        "lightning_accuracy", "lightning attention", minimax, (32, 16, 8, 4), _BALANCED,
        "Two layers of lightning attention of MiniMax with two heads, all cut in the mixed form.",
    ),
    "xlstm": Family(
        "xlstm_accuracy", "xLSTM", xlstm, (32, 16, 8), _BALANCED,
        "Two layers of xLSTM with eight heads, all folded into the weights.",
    ),
}  # fmt: skip
OTHERS = {
    "channels, random": random_channels,
    "channels, E[k^2] E[q^2]": channels_by_squares,
    "channels, pivoted QR of keys and queries": channels_by_pivoted_qr,
    "eigenvectors of the keys, mixed": eigenvectors_of("keys"),
    "eigenvectors of the queries, mixed": eigenvectors_of("queries"),
}


def trained(build: Callable[[], PreTrainedModel], seed: int, steps: int, rows: dict[str, Tensor]) -> PreTrainedModel:
    """A model that was trained to tell the digit and, a little, the next pixel."""
    torch.manual_seed(seed)
    model = build()
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


def measure(family: Family, seeds: int, steps: int) -> None:
    """Train models of a family on the digits, cut copies in every way, test each copy at once, and write the table."""
    train_set, test_set = digit_sequences()
    rows = {name: torch.as_tensor(train_set[name][:]) for name in ("input_ids", "labels")}
    test = torch.as_tensor(test_set["input_ids"][:])
    batch = {name: value[:64] for name, value in rows.items()}
    base, found = [], {name: {kept: [] for kept in family.kept} for name in (*family.ours, *OTHERS)}
    for seed in range(seeds):
        model = trained(family.build, seed, steps, rows)
        base.append(accuracy(model, test))
        layers, vectors = find_layers(model), []
        for layer in layers:
            vectors.append(Vectors())
            with layer.observed(vectors[-1]), torch.no_grad():
                model(input_ids=batch["input_ids"])
        gramians = calibrate(model, layers, [batch], progress=False).gramians
        for kept in family.kept:
            for name, reductor in family.ours.items():
                cuts = [gramians[layer.name].truncate(kept, reductor, CompreSSMConfig()) for layer in layers]
                found[name][kept].append(accuracy_after(model, cuts, test, mixed="mixed" in name))
            for name, method in OTHERS.items():
                cuts = [method(each, kept) for each in vectors]
                found[name][kept].append(accuracy_after(model, cuts, test, mixed="mixed" in name))
    write_result(
        family.result,
        f"Test accuracy right after cutting d_k = {N} of {family.title} (uncut: {_mean_and_spread(base)})",
        ["method", *(f"r = {kept}" for kept in family.kept)],
        [[name, *(_mean_and_spread(found[name][kept]) for kept in family.kept)] for name in found],
        {"uncut": base, **found},
        f"{family.note} Trained on 8x8 digits read pixel by pixel, {steps} steps, {seeds} seeds, 360 test images; mean "
        "and standard deviation over seeds. Calibrated on 64 training images.",
    )


def main() -> None:
    """Measure each family."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="models to train")
    options.add_argument("--steps", type=int, default=900, help="training steps of each")
    options.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which tables to write"
    )
    options = options.parse_args()
    with fast_cpu_scan():
        for name in options.families:
            measure(FAMILIES[name], options.seeds, options.steps)


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


if __name__ == "__main__":
    main()
