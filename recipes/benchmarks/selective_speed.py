"""Training step, decoding and cache of Mamba-2, FalconMamba, Jamba and a hybrid, before and after a cut."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import cache_of, median_seconds, parser, token_batch, training_step, write_result
from selective_models import FAMILIES, STATE_SIZE, make_model
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan

KEPT = 8
VOCABULARY = 256
FORMS = {"selection": {"stock": True, "reductor": "selection"}, "mixed": {}}


def cache_bytes(model: PreTrainedModel, tokens: torch.Tensor) -> int:
    """Bytes of the recurrent states that generation keeps for these sequences (without convolutions and attention)."""
    with torch.no_grad():
        (cache,) = cache_of(model(input_ids=tokens, use_cache=True)).values()
    states = [state for layer in cache.layers for state in _tensors(getattr(layer, "recurrent_states", None))]
    return sum(state.numel() * state.element_size() for state in states)


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found or ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def tokens_per_second(models: list[PreTrainedModel], tokens: torch.Tensor, new: int, repeats: int) -> list[float]:
    """Decoded tokens per second of each model, the models taking turns; the best of several turns."""
    best = [0.0] * len(models)
    for _ in range(repeats):
        for number, model in enumerate(models):
            start = time.perf_counter()
            model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            best[number] = max(best[number], new * len(tokens) / (time.perf_counter() - start))
    return best


def main() -> None:
    """Time full and cut models side by side."""
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    options = options.parse_args()
    batch = token_batch(16, 256, VOCABULARY)
    figures: dict[str, Any] = {}
    rows = []
    for family in options.families:
        torch.manual_seed(0)
        models = {"N = 64": make_model(family, VOCABULARY, width=options.width)}
        for form, settings in FORMS.items():
            models[f"{form}, N = {KEPT}"] = copy.deepcopy(models["N = 64"])
            config = CompreSSMConfig(strategy="fixed", keep_ratio=KEPT / STATE_SIZE, **settings)
            compress(models[f"{form}, N = {KEPT}"], [batch], config, progress=False)
        with fast_cpu_scan():
            seconds = median_seconds([training_step(model, batch) for model in models.values()], options.repeats)
            for model in models.values():
                model.eval()
            prompt = batch["input_ids"][:, :16]
            speed = tokens_per_second(list(models.values()), prompt, 64, max(2, options.repeats // 2))
        memory = [cache_bytes(model, prompt) for model in models.values()]
        for number, name in enumerate(models):
            figures.setdefault(family, {})[name] = {
                "step_seconds": seconds[number],
                "tokens_per_second": speed[number],
                "recurrent_state_bytes": memory[number],
            }
            rows.append(
                [
                    "" if number else family,
                    name,
                    f"{seconds[number] * 1e3:.0f} ms ({seconds[0] / seconds[number]:.2f}x)",
                    f"{speed[number]:,.0f} ({speed[number] / speed[0]:.2f}x)",
                    f"{memory[number]:,} ({memory[number] / memory[0]:.3f})",
                ]
            )
    write_result(
        "selective_speed",
        f"Training step, decoding and recurrent cache on a CPU, N = {STATE_SIZE} and {KEPT}",
        ["family", "model", "training step", "decoded tokens / s", "bytes of recurrent state"],
        rows,
        figures,
        f"Random weights, width {options.width}, two state-space layers (jamba, bamba: an attention layer between "
        "them); 16 sequences of 256 tokens a step, 64 tokens decoded for 16 prompts of 16. All models of a family take "
        "turns; medians of steps, best of decodings.",
    )


if __name__ == "__main__":
    main()
