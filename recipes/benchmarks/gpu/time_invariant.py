"""LRU and S4D: training step before and after a cut, and the variants of the diagonal scan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diagonal_scan import METHODS, arguments, step

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.models import LRUConfig, LRUForSequenceClassification, S4DConfig, S4DForSequenceClassification

from .comparison import training_steps
from .session import Session, gigabytes, milliseconds

FAMILIES = {"lru": (LRUConfig, LRUForSequenceClassification), "s4d": (S4DConfig, S4DForSequenceClassification)}
# Family, layers, states, width, batch, length, share of the states that is kept.
SETTINGS = (("lru", 6, 384, 512, 32, 1024, (0.25, 0.125)), ("s4d", 6, 64, 512, 32, 1024, (0.25, 0.125)))
TINY = (("lru", 2, 16, 8, 2, 16, (0.5,)), ("s4d", 2, 16, 8, 2, 16, (0.5,)))
# Batch, length, N, H of the bare recurrence.
SCANS = ((32, 1024, 384, 512), (32, 1024, 96, 512), (32, 1024, 48, 512), (4, 8192, 384, 512))
TINY_SCANS = ((2, 16, 8, 4),)
_LARGEST_KERNEL = 2**28


def run(session: Session) -> None:
    """Both tables."""
    _steps(session)
    _scans(session)


def _steps(session: Session) -> None:
    rows, figures = [], {}
    for family, layers, states, width, batch_size, length, ratios in TINY if session.tiny else SETTINGS:
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        config = config_class(
            input_size=1, hidden_size=width, num_hidden_layers=layers, state_size=states, num_labels=10, dropout=0.0
        )
        model = model_class(config).to(session.device)
        values = torch.randn(batch_size, length, 1, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(batch_size) % 10
        batch = {"input_values": values.to(session.device), "labels": labels.to(session.device)}
        builders: dict[str, Callable[[], torch.nn.Module]] = {f"{family}, full": partial(copy.deepcopy, model)}
        for ratio in ratios:
            builders[f"{family}, {ratio:g} of the states"] = partial(_cut, model, ratio)
        for precision, make_step in (("float32", _step), ("bf16", partial(_step, dtype=torch.bfloat16))):
            _, found = training_steps(session, builders, batch, 1 if session.tiny else 10, make_step)
            figures[f"{family}, {precision}"] = found
            reference = found.get(f"{family}, full", {})
            for ratio, name in zip((1, *ratios), builders):
                row = found.get(name, {})
                shape = f"{family.upper()}, {layers} layers of width {width}, {batch_size} x {length}"
                time = milliseconds(row.get("step_seconds"), reference.get("step_seconds"))
                rows.append([shape, precision, f"{round(ratio * states)}", time, gigabytes(row.get("peak_bytes"))])
    session.write(
        "gpu_time_invariant",
        "Training step of LRU and S4D before and after a cut",
        ["model", "precision", "N", "training step", "peak memory of a step"],
        rows,
        figures,
        "Classifiers of real-valued sequences, random weights and data; cut by `compress` with balanced truncation. "
        "Forward, backward, fused AdamW (bf16: under autocast; the recurrences stay in float32); medians of "
        "synchronised calls, the sizes taking turns; in brackets against the full size.",
    )


def _step(
    session: Session, model: torch.nn.Module, batch: dict[str, Any], dtype: torch.dtype | None = None
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def one() -> None:
        optimizer.zero_grad()
        with torch.autocast(session.device.type, dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return one


def _cut(model: torch.nn.Module, ratio: float) -> torch.nn.Module:
    small = copy.deepcopy(model)
    record = compress(small, config=CompreSSMConfig(strategy="fixed", keep_ratio=ratio))
    if record.outcome != "cut":
        raise RuntimeError(f"nothing was cut: {record.summary()}")
    return small


def _scans(session: Session) -> None:
    rows, figures = [], []
    names = [name for name in METHODS if name != "loop"]
    for batch, length, n, width in TINY_SCANS if session.tiny else SCANS:
        tensors = [t.detach().to(session.device).requires_grad_() for t in arguments(batch, length, n, width)]
        calls, found = {}, {}
        for name in names:
            if name == "convolution" and width * width * length > _LARGEST_KERNEL:
                continue
            call = step(METHODS[name], tensors)
            before = session.allocated()
            peak = session.attempt(f"{name}, N = {n}", partial(_peak, session, call, before))
            if peak is not None:
                calls[name], found[name] = call, {"peak_bytes": peak[0]}
        seconds = session.attempt(
            f"scans, N = {n}", partial(session.medians, list(calls.values()), 1 if session.tiny else 10)
        )
        for name, median in zip(calls, seconds or ()):
            found[name]["seconds"] = median
        figures.append({"batch": batch, "length": length, "N": n, "H": width, **found})
        measured = [found.get(name, {}) for name in names]
        cells = [f"{milliseconds(m.get('seconds'), None)}, {gigabytes(m.get('peak_bytes'))}" for m in measured]
        rows.append([f"{batch} x {length}", str(n), str(width), *cells])
    session.write(
        "gpu_diagonal_scan",
        "Recurrence of an LRU layer, forward and backward, by three methods",
        ["batch x time", "N", "H", *names],
        rows,
        figures,
        "`products` keeps every state; `convolution` makes the H x H impulse responses (a dash where they would have "
        "more than 2^28 entries); `diagonal_recurrence`, which the models use, runs piece by piece and computes states "
        "again for the backward pass. float32, medians of synchronised calls; memory beyond the arguments.",
    )


def _peak(session: Session, call: Callable[[], None], before: int) -> tuple[int | None]:
    call()
    return (session.peak_bytes(call, before),)
