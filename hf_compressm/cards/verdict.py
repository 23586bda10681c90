"""What a training with cuts came to, in one line, as peft prints trainable parameters."""

from __future__ import annotations

from ..compression.history import size_range
from .provenance import Provenance


def verdict(provenance: Provenance) -> str | None:
    """
    States, parameters, step time and the effect of the cuts on the calibration loss, in one line.

    Args:
        provenance ([`Provenance`]): The facts at the end of the training.

    Returns:
        `str` or `None`: The line; None where no check was made.
    """
    if not provenance.records:
        return None
    cuts = provenance.cuts
    if not cuts:
        return f"nothing was cut: {provenance.records[-1].reason}"
    layers = provenance.layers()
    before, after = cuts[0].parameters_before, cuts[-1].parameters_after
    parts = [
        f"states {size_range(first for first, _ in layers)} -> {size_range(layer.size_after for _, layer in layers)} "
        f"in {len(layers)} layers",
        f"parameters {before:,} -> {after:,} ({after / before:.1%})",
    ]
    if provenance.step_seconds is not None:
        first, last = (1e3 * seconds for seconds in provenance.step_seconds)
        parts.append(f"{first:.1f} -> {last:.1f} ms a step")
    losses = [
        f"{cut.loss_before:.4f} -> {cut.loss_after:.4f}" + (f" at step {cut.step:,}" if cut.step is not None else "")
        for cut in cuts
        if cut.loss_before is not None and cut.loss_after is not None
    ]
    if losses:
        parts.append(f"calibration loss {', '.join(losses)}")
    return "; ".join(parts)
