"""What the parts share: where they run, fair timing, what goes on after a failure, and tables that say where from."""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import RESULTS, provenance, write_result

KERNELS = ("mamba_ssm", "causal_conv1d", "flash-linear-attention", "triton", "accelerate")
Found = TypeVar("Found")


@dataclass
class Session:
    """
    Where a part runs and what went wrong in it.

    Args:
        device (`torch.device`): What is measured.
        tiny (`bool`): Sizes with which every line runs in seconds on a CPU, instead of those of the tables.
        output (`Path`): Folder of the tables.
        seconds (`float`): How long the part may go on; what has not begun by then is left out.
    """

    device: torch.device
    tiny: bool = False
    output: Path = RESULTS
    seconds: float = 150.0
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def attempt(self, what: str, function: Callable[[], Found]) -> Found | None:
        """What the function returns, or None where it fails or the part's time is over; which is noted."""
        if time.perf_counter() - self.started > self.seconds:
            self.failures.append(f"{what}: left out, the part's {self.seconds:.0f} s were over")
            return None
        try:
            return function()
        except Exception as error:  # whatever it is, the other figures are still wanted
            traceback.print_exc()
            message = (str(error).strip() or "no message").splitlines()[0][:200]
            self.failures.append(f"{what}: {type(error).__name__}: {message}")
            return None
        finally:
            # What the failed one held would be missing to the next.
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def medians(self, functions: Sequence[Callable[[], Any]], repeats: int, warm_up: int = 3) -> list[float]:
        """
        Median seconds of each function, the functions taking turns, the device idle before and after each call.

        Args:
            functions (`Sequence[Callable]`): What is timed.
            repeats (`int`): Timed calls of each.
            warm_up (`int`, *optional*, defaults to 3): Untimed calls of each before that.
        """
        times: list[list[float]] = [[] for _ in functions]
        for turn in range(warm_up + repeats):
            for function, collected in zip(functions, times):
                self.wait()
                start = time.perf_counter()
                function()
                self.wait()
                if turn >= warm_up:
                    collected.append(time.perf_counter() - start)
        return [statistics.median(collected) for collected in times]

    def peak_bytes(self, function: Callable[[], Any], before: int) -> int | None:
        """The most memory that a call had allocated beyond `before`; None on a CPU, where torch keeps no count."""
        if self.device.type != "cuda":
            function()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def allocated(self) -> int:
        """Bytes of tensors on the device now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def write(
        self, name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], figures: Any, note: str
    ) -> None:
        """A table of the part, `NAME.md` and `NAME.json`, with the device and what failed."""
        if self.failures:
            note += "\n\nFailed or left out: " + "; ".join(self.failures) + "."
        content = {"device": device_name(self.device), "failures": list(self.failures), "figures": figures}
        write_result(name, title, header, rows, content, note, made_by=made_by(self.device), folder=self.output)


def tune_quickly(configurations: int | None) -> None:
    """
    Let Triton time each of a kernel's configurations for 20 ms instead of 100, and only some of them.

    mamba-ssm's chunk scan has more than a hundred, each of which takes seconds to compile, for every state size.

    Args:
        configurations (`int`, *optional*): How many of each kernel's list, evenly from the first to the last; all when
            unset.
    """
    from triton.runtime import autotuner, driver
    from triton.testing import do_bench

    driver.active.get_benchmarker = lambda: partial(do_bench, warmup=5, rep=20)
    if configurations is None:
        return
    prune = autotuner.Autotuner.prune_configs

    def some(self: Any, *args: Any) -> list[Any]:
        found = prune(self, *args)
        steps = max(1, configurations - 1)
        return [found[i] for i in sorted({(len(found) - 1) * k // steps for k in range(configurations)})]

    autotuner.Autotuner.prune_configs = some


def kernels_in_place() -> bool:
    """Whether mamba-ssm and causal-conv1d can be imported, so that transformers takes their kernels."""
    try:
        importlib.import_module("causal_conv1d")
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError:
        return False
    return True


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def made_by(device: torch.device) -> str:
    """The device, the command and the versions behind a table."""
    found = []
    for package in KERNELS:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return f"{provenance()}, {', '.join(found)}; measured on {device_name(device)}{cuda}"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that knows where to run and how large."""
    made = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    made.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    made.add_argument("--tiny", action="store_true", help="sizes with which every line runs in seconds on a CPU")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    made.add_argument("--configurations", type=int, help="Triton configurations tried of each kernel; all when unset")
    made.add_argument("--seconds", type=float, default=150.0, help="how long each part may go on beginning new figures")
    return made


def milliseconds(seconds: float | None, reference: float | None) -> str:
    """A time beside how many times faster than a reference it is."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" + (f" ({reference / seconds:.2f}x)" if reference else "")


def gigabytes(count: int | None) -> str:
    """Bytes in GB."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"


def rate(tokens: float | None, reference: float | None) -> str:
    """Tokens per second beside how many times more than a reference it is."""
    if tokens is None:
        return "-"
    return f"{tokens:,.0f}" + (f" ({tokens / reference:.2f}x)" if reference else "")
