"""
Everything that is measured on one CUDA device, part by part; a part that fails is named and the others go on.

    python recipes/benchmarks/run_gpu.py [--parts mamba mamba2 ...] [--device cpu --tiny] [--seconds 150]

Each part runs in a process of its own, so that what breaks the device in one does not touch the next, and is ended when
it has gone on for twice its seconds.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

# What hides mamba-ssm and causal-conv1d has to come before transformers is imported.
if "without_kernels" in sys.argv:
    sys.modules.update(dict.fromkeys(("mamba_ssm", "causal_conv1d")))

import torch  # noqa: E402
from common import RESULTS  # noqa: E402
from gpu.session import Session, parser, tune_quickly  # noqa: E402

PARTS = {
    "mamba": ("gpu.mamba", "run"),
    "in_training": ("gpu.in_training", "run"),
    "reduction": ("gpu.reduction", "run"),
    "mamba2": ("gpu.mamba2", "run"),
    "delta_rule": ("gpu.delta_rule", "run"),
    "time_invariant": ("gpu.time_invariant", "run"),
    "without_kernels": ("gpu.mamba", "run_without_kernels"),
    "tests": ("gpu.suite", "run"),
}


def run_part(name: str, session: Session) -> list[str]:
    """
    Run one part in this process and say what failed in it.

    Args:
        name (`str`): One of `PARTS`.
        session (`Session`): Where it runs.
    """
    module, function = PARTS[name]
    try:
        getattr(importlib.import_module(module), function)(session)
    except Exception as error:  # it has no table then; the caller still wants its name
        session.failures.append(f"{name}: {type(error).__name__}: {error}")
        raise
    finally:
        for failure in session.failures:
            print(f"FAILED {failure}", flush=True)
    return session.failures


def run_all(parts: list[str], arguments: list[str], seconds: float) -> dict[str, str]:
    """
    Run parts one after the other, each in its own process; returns how each of them ended.

    Args:
        parts (`list[str]`): Names in `PARTS`.
        arguments (`list[str]`): Passed on to each process.
        seconds (`float`): Half of the time after which a process is ended.
    """
    ends = {}
    for part in parts:
        print(f"--- {part}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--one", part]
        try:
            code = subprocess.run(command, timeout=2 * seconds, check=False).returncode
            ends[part] = {0: "done", 3: "some figures failed"}.get(code, f"failed with exit code {code}")
        except subprocess.TimeoutExpired:
            ends[part] = "ended, it took too long"
        ends[part] += f", {time.perf_counter() - start:.0f} s"
    return ends


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser(__doc__ or "")
    made.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    made.add_argument("--one", choices=sorted(PARTS), help="run this part in this process")
    options = made.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --tiny tries every line without one")
        return 2
    if options.one:
        session = Session(torch.device(options.device), options.tiny, options.output, options.seconds)
        if session.device.type == "cuda":
            tune_quickly(options.configurations)
        return 3 if run_part(options.one, session) else 0
    shared = ["--device", options.device, "--seconds", f"{options.seconds:g}"]
    shared += ["--output", str(options.output)] if options.output != RESULTS else []
    shared += ["--tiny"] if options.tiny else []
    shared += ["--configurations", str(options.configurations)] if options.configurations else []
    ends = run_all(options.parts, shared, options.seconds)
    for part, end in ends.items():
        print(f"{part}: {end}")
    return 0 if all(end.startswith("done") for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
