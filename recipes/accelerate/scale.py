"""
What one check costs at 130 million, 2.8 and 7 billion parameters, from shapes, and a count that the formulas meet.

    python recipes/accelerate/scale.py [--sequences 8] [--length 2048] [--teraflops 400] [--gigabytes 25]

Writes `scale.md`. The large models are built on the meta device, which has shapes and no memory; small ones are built
for real, and what is summed over processes and multiplied in them is counted.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import Compressor
from hf_compressm.ops import default_sample_count

# Width, layers, states and vocabulary as in the published configurations of the three models.
MODELS = {
    "state-spaces/mamba-130m": (MambaForCausalLM, MambaConfig, 768, 24, 16, 50280),
    "state-spaces/mamba-2.8b": (MambaForCausalLM, MambaConfig, 2560, 64, 16, 50280),
    "tiiuae/falcon-mamba-7b": (FalconMambaForCausalLM, FalconMambaConfig, 4096, 64, 16, 65024),
}


@dataclass(frozen=True)
class Sizes:
    """
    What the costs depend on.

    Args:
        parameters (`int`): Parameters of the model.
        multiplied (`int`): Those that are entries of matrices that every token is multiplied with.
        layers (`int`): Selective layers.
        channels (`int`): Channels of each.
        states (`int`): States of each channel, N.
    """

    parameters: int
    multiplied: int
    layers: int
    channels: int
    states: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        """Read the sizes off a model, on any device."""
        linear = [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)]
        mixers = [module for module in model.modules() if hasattr(module, "A_log")]
        channels, states = mixers[0].A_log.shape
        parameters = {id(p): p.numel() for p in model.parameters()}
        return cls(sum(parameters.values()), sum(linear), len(mixers), channels, states)

    def summed_bytes(self) -> int:
        """Bytes, in float64, that a process gives to the sums: P, Q, R, three numbers a state, rows; two losses."""
        per_layer = 3 * self.states**2 + 3 * self.states + 1
        return 8 * (self.layers * per_layer + 2 * 3)

    def matrix_flops(self, tokens: int) -> int:
        """Operations of the matrices in a forward pass."""
        return 2 * self.multiplied * tokens

    def check_flops(self, sequences: int, length: int) -> int:
        """
        Operations of a check: forward and backward pass, a second forward pass, recurrences, products of samples and
        of readouts.

        A recurrence is counted with 6 operations a state and step, three times for each Gramian and pass.
        """
        tokens = sequences * length
        passes = 4 * self.matrix_flops(tokens)
        recurrences = self.layers * 5 * 6 * self.channels * self.states * tokens
        samples = sequences * default_sample_count(length, self.states)
        products = self.layers * 2 * 2 * self.channels * self.states**2 * samples
        readouts = self.layers * 2 * self.states**2 * tokens
        return passes + recurrences + products + readouts

    def gramian_bytes(self) -> int:
        """What a calibration holds beside the passes: three Gramians, three numbers a state; float64."""
        return 8 * self.layers * (3 * self.states**2 + 3 * self.states)

    def kept_bytes(self, sequences: int, length: int, element: int = 2) -> int:
        """What the layers' taps keep until the backward pass: u, delta (channels wide), B and C of each step."""
        return self.layers * sequences * length * (2 * self.channels + 2 * self.states) * element


class Counting:
    """One process that counts what it would give to the sums."""

    def __init__(self) -> None:
        self.bytes = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def first(self, value: Any) -> Any:
        """The value itself."""
        return value

    def agree(self, subject: str, facts: dict) -> None:
        """Nothing."""

    def failed(self, error: BaseException) -> None:
        """Nothing."""


def small_model(width: int, layers: int, states: int) -> MambaForCausalLM:
    """A Mamba that fits here."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=layers, state_size=states,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MambaForCausalLM(config)


def counted() -> list[list[str]]:
    """Formula and count on three small models."""
    rows = []
    for width, layers, states in ((32, 2, 16), (64, 3, 32), (128, 4, 64)):
        model, tokens = small_model(width, layers, states), torch.randint(0, 256, (2, 64))
        sizes, processes = Sizes.of(model), Counting()
        batch = {"input_ids": tokens, "labels": tokens}
        compressor = Compressor(model, CompreSSMConfig(strategy="fixed"), processes=processes, progress=False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        compressor.check([batch])
        # The counter also sees the convolutions and what else is a product; the matrices are the formula's part.
        ratio = counter.get_total_flops() / sizes.matrix_flops(tokens.numel())
        name = f"width {width}, {layers} layers, N = {states}"
        rows.append([name, f"{sizes.summed_bytes():,}", f"{processes.bytes:,}", f"{ratio:.3f}"])
    return rows


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8, help="calibration sequences of each process")
    parser.add_argument("--length", type=int, default=2048, help="their length")
    parser.add_argument("--teraflops", type=float, default=400.0, help="what a device reaches, in 10^12 operations / s")
    parser.add_argument(
        "--gigabytes", type=float, default=25.0, help="what the slowest link carries, in 10^9 bytes / s"
    )
    options = parser.parse_args()
    rows = []
    for name, (model_class, config_class, width, layers, states, vocabulary) in MODELS.items():
        with torch.device("meta"):
            config = config_class(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=states)
            sizes = Sizes.of(model_class(config))
        tokens = options.sequences * options.length
        step = 3 * sizes.matrix_flops(tokens)
        check = sizes.check_flops(options.sequences, options.length)
        seconds = check / options.teraflops / 1e12 + sizes.summed_bytes() / options.gigabytes / 1e9
        rows.append(
            [
                name,
                f"{sizes.parameters / 1e6:,.0f} M",
                f"{check / 1e12:,.1f}",
                f"{check / step:.2f}",
                f"{sizes.summed_bytes() / 1e3:,.0f} kB",
                f"{sizes.gramian_bytes() / 1e6:,.2f} MB",
                f"{sizes.kept_bytes(options.sequences, options.length) / 1e9:,.1f} GB",
                f"{seconds:.2f} s",
            ]
        )
    header = [
        "model",
        "parameters",
        "10^12 operations",
        "steps of the same batch",
        "summed",
        "Gramians",
        "kept",
        "time",
    ]
    large = tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)
    setting = (
        f"For each process {options.sequences} calibration sequences of {options.length} tokens, on a device that\n"
        f"reaches {options.teraflops:g} x 10^12 operations a second, with a slowest link of {options.gigabytes:g} GB/s."
    )
    header = ["model", "bytes by formula", "bytes counted", "operations counted / formula"]
    small = tabulate(counted(), headers=header, tablefmt="github", disable_numparse=True)
    text = f"""# What one check costs, on paper

{setting}

None of these models was run: the figures follow from their shapes. Small operations and memory traffic are not in them,
so the time is a lower bound.

{large}

- *Operations*: a forward and a backward pass (as much as three forward passes) and the forward pass that measures the
  loss after the cut, `4 x 2 x (entries of all matrices) x tokens`; the recurrences of the scan, of P and of Q; the
  products of sampled states and of readouts. A training step of the same batch takes three forward passes.
- *Summed*: what one process gives to the all-reduce, `8 x (layers x (3 N^2 + 3 N + 1) + 6)` bytes, in float64.
- *Gramians*: what a calibration holds for all layers until the spectra are known, `8 x layers x (3 N^2 + 3 N)` bytes.
- *Kept*: inputs of the scans that wait for the backward pass, two bytes a number; a step keeps most of them too.

The same formulas on small models, against what was counted while a check ran:

{small}

Made by `python recipes/accelerate/scale.py`; Python {platform.python_version()}, torch {version("torch")}, transformers
{version("transformers")}.
"""
    (Path(__file__).parent / "scale.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
