r"""
The mixed form of a mixer that keeps its own forward pass: the arguments of its scan are combined where it calls it.

transformers calls its recurrences by global names of the mixer's module. While a mixed mixer runs, these names stand
for functions that combine the entries of B and C (the keys and queries of linear attention), and call the recurrence
with the results. The size of the state is that of its arguments, also in a cache.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .stock_families import ScanCall, family_of_mixer

_lock = threading.RLock()
_installed: dict[tuple[int, str], tuple[Callable[..., Any], Callable[..., Any], int]] = {}
_running: ContextVar[nn.Module | None] = ContextVar("compressed_mixer_that_runs", default=None)


class MixedScan:
    r"""
    What a mixer of the kind `"scan"` does with `input_mixing` and `readout_mixing`, both `(N, r)` or `(groups, N, r)`:
    its scan gets \\( \tilde B_t = W^\top B_t, \tilde C_t = T^\top C_t \\).
    """

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mixer."""
        row = family_of_mixer(type(self))
        with _combining(self, vars(sys.modules[row.modeling]), row.scans):
            return super().forward(*args, **kwargs)

    def combined(self, call: ScanCall, arguments: dict[str, Any]) -> dict[str, Any]:
        """
        The arguments of a scan with the states combined; a kind whose scan first norms them does so here.

        Args:
            call ([`ScanCall`]): How the scan is called.
            arguments (`dict`): What the forward pass gives it, by name.
        """
        mixings = {call.write: self.input_mixing, call.read: self.readout_mixing}
        return {**arguments, **{name: mixed_entries(arguments[name], mixing) for name, mixing in mixings.items()}}


def mixed_entries(entries: Tensor, mixing: Tensor) -> Tensor:
    """
    Entries of B or C, combined on their last axis.

    Args:
        entries (`torch.Tensor` of shape `(..., N)` or `(..., groups, N)`): The entries.
        mixing (`torch.Tensor` of shape `(N, r)` or `(groups, N, r)`): The matrix, or one for each group.

    Returns:
        `torch.Tensor` of shape `(..., r)` or `(..., groups, r)`.
    """
    equation = "...n,nr->...r" if mixing.ndim == 2 else "...gn,gnr->...gr"
    return torch.einsum(equation, entries, mixing.to(entries.dtype))


@contextmanager
def _combining(mixer: nn.Module, namespace: dict[str, Any], calls: tuple[ScanCall, ...]) -> Iterator[None]:
    """While the context is open, the calls of one mixer, in one thread, get combined arguments."""
    with _lock:
        for call in calls:
            _install(namespace, call)
    token = _running.set(mixer)
    try:
        yield
    finally:
        _running.reset(token)
        with _lock:
            for call in calls:
                _remove(namespace, call.name)


def _install(namespace: dict[str, Any], call: ScanCall) -> None:
    stock = namespace[call.name]
    known, stock, users = _installed.get((id(namespace), call.name), (_combining_call(stock, call), stock, 0))
    if users == 0:
        namespace[call.name] = known
    _installed[id(namespace), call.name] = (known, stock, users + 1)


def _remove(namespace: dict[str, Any], name: str) -> None:
    known, stock, users = _installed.pop((id(namespace), name))
    if users > 1:
        _installed[id(namespace), name] = (known, stock, users - 1)
    elif namespace[name] is known:
        # Otherwise another thread has put something around it that still leads here; without a mixer it does nothing.
        namespace[name] = stock


def _combining_call(stock: Callable[..., Any], call: ScanCall) -> Callable[..., Any]:
    @functools.wraps(stock)
    def scan(*args: Any, **kwargs: Any) -> Any:
        mixer = _running.get()
        if mixer is None:
            return stock(*args, **kwargs)
        # Behind the signature may stand a kernel with its parameters in another order: names stay names.
        positional = list(inspect.signature(stock).parameters)[: len(args)]
        named = mixer.combined(call, {**dict(zip(positional, args)), **kwargs})
        args = [named.pop(name) for name in positional]
        # A scan that calls another one has combined its arguments already.
        token = _running.set(None)
        try:
            return stock(*args, **named)
        finally:
            _running.reset(token)

    return scan
