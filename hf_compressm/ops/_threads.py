"""
A small thread pool for kernels that run without the GIL.

Numba's own parallel loops are not used: their default threading layer ends the process when two Python threads enter it
at once, the OpenMP layer ends a forked child that enters it, and which layer is loaded is one choice for the whole
process, which a library should leave to its user. Python threads have none of these limits, and starting a unit costs
some ten microseconds, little beside a kernel.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_executor: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def run_units(function: Callable[..., Any], units: Sequence[tuple[Any, ...]]) -> None:
    """
    Call a function that releases the GIL once for each tuple of arguments, on as many threads as torch uses.

    The calling thread takes part, so the call also ends when all other threads are busy. Units write to separate
    memory: which thread runs which has no influence on the result.
    """
    waiting = deque(units)

    def drain() -> None:
        while True:
            try:
                unit = waiting.popleft()
            except IndexError:
                return
            function(*unit)

    n_helpers = min(torch.get_num_threads(), len(units)) - 1
    helpers = [_get_executor().submit(drain) for _ in range(n_helpers)]
    try:
        drain()
    finally:
        # After an error too: a helper must not write to memory that the caller is about to free.
        waiting.clear()
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in filter(None, errors):
        raise error


def split_range(length: int, n_parts: int) -> list[tuple[int, int]]:
    """Cut `range(length)` into at most `n_parts` pieces (first, past the last), none empty, as equal as can be."""
    n_parts = min(length, n_parts)
    edges = [length * part // n_parts for part in range(n_parts + 1)] if n_parts > 0 else []
    return list(zip(edges, edges[1:]))


def _get_executor() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            # Threads are started only when they are needed; the limit is for callers with many threads of their own.
            _executor = ThreadPoolExecutor(max_workers=4 * (os.cpu_count() or 1), thread_name_prefix="hf_compressm")
        return _executor


def _forget_executor() -> None:
    # A forked child has the executor without its threads, and possibly a lock that nobody will release.
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_executor)
