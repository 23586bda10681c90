"""What one reduction costs, in training steps, at 130 million parameters."""

from __future__ import annotations

import copy
import statistics
import time
from functools import partial

import torch

from hf_compressm import CompreSSMConfig, compress

from .language_models import bf16_step, make, token_batch
from .session import Session

# Family, N, layers, width, vocabulary, batch, length: the shapes of mamba-130m and mamba2-130m, and N = 128 in both.
SETTINGS = (
    ("mamba", 16, 24, 768, 50280, 8, 2048),
    ("mamba2", 128, 24, 768, 50280, 8, 2048),
    ("mamba", 128, 24, 768, 50280, 8, 2048),
)
TINY = (("mamba", 8, 2, 32, 27, 2, 16), ("mamba2", 8, 2, 64, 27, 2, 16))
KEPT = 0.25


def run(session: Session) -> None:
    """Time a reduction beside a training step of the same model on a batch of the same size."""
    rows, figures = [], {}
    for setting in TINY if session.tiny else SETTINGS:
        family, n, layers, width, vocabulary, batch_size, length = setting
        name = f"{family}, {layers} layers of width {width}, N = {n}"
        found = session.attempt(name, partial(_measure, session, *setting))
        if found is None:
            continue
        figures[name] = found
        rows.append(
            [
                name,
                f"{found['parameters'] / 1e6:.1f} million",
                f"{batch_size} x {length}",
                f"{found['step_seconds'] * 1e3:.1f} ms",
                f"{found['reduction_seconds'] * 1e3:.0f} ms",
                f"{found['reduction_seconds'] / found['step_seconds']:.1f}",
                f"{found['first_reduction_seconds']:.1f} s",
            ]
        )
    session.write(
        "gpu_reduction_cost",
        "Cost of one reduction in training steps",
        ["model", "parameters", "batch", "training step", "reduction", "in steps", "the process's first"],
        rows,
        figures,
        "One `compress` with the optimizer: a calibration batch of the training batch's size, Gramians from states and "
        f"adjoint states, spectra, the cut to {KEPT:g} of the states without a fit of readouts, moments carried over, "
        "loss before and after, under bf16 autocast. Medians of synchronised calls after a first one, which also "
        "compiles kernels. Training step: bf16 autocast, fused AdamW.",
    )


def _measure(
    session: Session, family: str, n: int, layers: int, width: int, vocabulary: int, batch_size: int, length: int
) -> dict[str, float]:
    shape = {"chunk_size": 8, "head_dim": 16} if session.tiny and family == "mamba2" else {}
    model = make(family, n, width, layers, vocabulary, **shape).to(session.device)
    batch = token_batch(session, batch_size, length, vocabulary)
    [step_seconds] = session.medians([bf16_step(session, model, batch)], 1 if session.tiny else 7)
    times = [_reduction_seconds(session, model, batch) for _ in range(2)]
    if sum(times) < 20 and not session.tiny:
        times.append(_reduction_seconds(session, model, batch))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": step_seconds,
        "reduction_seconds": statistics.median(times[1:]),
        "first_reduction_seconds": times[0],
    }


def _bf16_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as a model gives it that the Trainer has prepared with `bf16=True`."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        return model(**batch).loss


def _reduction_seconds(session: Session, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    victim = copy.deepcopy(model)  # so that the same full model can be cut again
    optimizer = torch.optim.AdamW(victim.parameters(), lr=1e-4, fused=True)
    for parameter in victim.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    session.wait()
    start = time.perf_counter()
    record = compress(victim, [batch], CompreSSMConfig(strategy="fixed", keep_ratio=KEPT), optimizer, _bf16_loss)
    session.wait()
    seconds = time.perf_counter() - start
    if record.outcome != "cut":
        raise RuntimeError(f"nothing was cut: {record.summary()}")
    return seconds
