"""The switch that puts this library's scan in the place of transformers', with what stands around it, and takes it out.

transformers calls its scan through a module-level name. Its own replacement mechanism (the `kernels` package) takes
packaged repositories, changes a model for good and is not installed by default, so the switch rebinds that name
instead: every model of the process profits, whoever built it, and removing the replacement leaves no trace. A
replacement that the `kernels` package has put behind the name is kept and still serves the calls that are not for us.

The same replacement lets a calibration pass watch a layer's scan: [`watching`] names the observer of the calls made
inside it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ...errors import ConfigurationError
from ...ops import is_transformed
from ..contract import ScanObserver
from .inputs import ScanInputs

logger = logging.getLogger(__name__)

Replacement = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the stock function and returns the one that stands in its place."""

Owner = dict[str, Any] | type
"""What holds a function that can be replaced: the globals of a module, or a class."""

_lock = threading.RLock()
_replacements: dict[str, dict[str, Replacement]] = {}
_companions: dict[str, dict[str, Replacement]] = {}
_installed: dict[tuple[int, str], tuple[Owner, Callable[..., Any], int]] = {}
_enabled_for_good = False
_enabled_by_contexts = 0
_observer: ContextVar[ScanObserver | None] = ContextVar("hf_compressm_scan_observer", default=None)


def register_scan(module_name: str, replacements: dict[str, Replacement]) -> None:
    """
    Make known where a family calls its scan.

    Args:
        module_name (`str`): The module whose global names the family's forward pass uses. It is imported only when the
            switch is first used.
        replacements (`dict[str, Replacement]`): For each global name, what makes the function that replaces it. Other
            modules may have other functions by the same name.

    Raises:
        [`~errors.ConfigurationError`]: another replacement is known for a name in that module.
    """
    known = _replacements.setdefault(module_name, {})
    for name, replacement in replacements.items():
        if known.get(name, replacement) is not replacement:
            raise ConfigurationError(
                f"{module_name}.{name} is already replaced by {known[name].__module__}.{known[name].__qualname__}, so "
                f"{replacement.__module__}.{replacement.__qualname__} can't be; register one of them."
            )
    known.update(replacements)


def register_companions(module_name: str, replacements: dict[str, Replacement]) -> None:
    """
    Make known which functions beside its scan a family calls that are faster through this library.

    They are replaced with the scan while the switch is on. They say nothing of what a layer is, and no calibration
    pass watches them.

    Args:
        module_name (`str`): The module whose global names the family's forward pass uses.
        replacements (`dict[str, Replacement]`): For each global name, or name of a method as in `"MambaMixer.forward"`,
            what makes the function that replaces it.
    """
    _companions.setdefault(module_name, {}).update(replacements)


def _replacements_in(namespace: dict[str, Any]) -> dict[str, Replacement]:
    """
    The names in a module's globals that can be replaced, and by what.

    A module that nobody has registered, such as mamba-ssm's or one that came with a checkpoint, calls scans by names
    that others have; where several have one, the first that was registered counts.
    """
    own = _replacements.get(namespace.get("__name__"))
    if own is None:
        own = {name: found for known in reversed(_replacements.values()) for name, found in known.items()}
    return {name: replacement for name, replacement in own.items() if name in namespace}


def watched(inputs_of: Callable[..., ScanInputs]) -> Replacement:
    """
    A replacement that computes what the recurrence does and shows it to the observer of the layer that runs it.

    Args:
        inputs_of (`Callable`): Takes the arguments of the recurrence and returns the [`~architectures.ScanInputs`] that
            they are. The recurrence returns its raw output, before any skip or gate, or a tuple that begins with it.
    """

    def replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def scan(*args: Any, **kwargs: Any) -> Any:
            observer, result = current_observer(), stock(*args, **kwargs)
            if observer is None:
                return result
            if is_packed(**kwargs):
                warn_of_packing()
            output, *others = result if isinstance(result, tuple) else (result,)
            output = observer.observe(inputs_of(*args, **kwargs), output)
            return (output, *others) if isinstance(result, tuple) else output

        return scan

    return replacement


def is_packed(**kwargs: Any) -> bool:
    """Whether the arguments of a scan say that several sequences lie behind one another in a row."""
    return any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))


@functools.lru_cache(maxsize=1)
def warn_of_packing() -> None:
    """Warn once that what is observed of packed sequences is not exact."""
    logger.warning(
        "The calibration batches hold packed sequences. Their Gramians are measured as if the state went on from one "
        "sequence into the next; give calibration_batches that are not packed for exact ones."
    )


def enable_fast_cpu_scan() -> None:
    """
    Let supported layers on a CPU run through the kernels of this library, until [`disable_fast_cpu_scan`].

    These are the scan and the convolution in front of it; Mamba, FalconMamba, Jamba and Zamba run through one for all
    that stands between two projections, and the first three in the single steps that write to a cache too. Layers on
    other devices, calls under `torch.compile`, `torch.export` or a transform of `torch.func`, forward-mode
    differentiation, and calls with arguments that the kernels do not know keep running through transformers' own code.
    A second derivative, as of a gradient penalty, is computed through the plain recurrence.
    """
    global _enabled_for_good
    with _lock:
        if not _enabled_for_good:
            _enabled_for_good = True
            _install_defaults()


def disable_fast_cpu_scan() -> None:
    """Undo [`enable_fast_cpu_scan`]; transformers is then exactly as it was."""
    global _enabled_for_good
    with _lock:
        if _enabled_for_good:
            _enabled_for_good = False
            _remove_defaults()


@contextmanager
def fast_cpu_scan(enabled: bool = True) -> Iterator[None]:
    """
    Let supported layers on a CPU run through the kernels of this library while the context is open, as
    [`enable_fast_cpu_scan`] does for good.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): With `False` the context changes nothing.

    Example:

    ```python
    >>> from hf_compressm import fast_cpu_scan

    >>> with fast_cpu_scan():
    ...     pass  # forward and backward passes of Mamba models on a CPU are fast here

    ```
    """
    global _enabled_by_contexts
    if not enabled:
        yield
        return
    with _lock:
        _enabled_by_contexts += 1
        _install_defaults()
    try:
        yield
    finally:
        with _lock:
            _enabled_by_contexts -= 1
            _remove_defaults()


def fast_cpu_scan_enabled() -> bool:
    """Whether supported layers on a CPU run through the kernels of this library now."""
    return _enabled_for_good or _enabled_by_contexts > 0


def current_observer() -> ScanObserver | None:
    """The observer of the layer whose forward pass is running, if a calibration pass is watching it."""
    # What is traced or transformed holds no values that could be measured.
    return None if torch.compiler.is_compiling() or is_transformed() else _observer.get()


@contextmanager
def watching(module: nn.Module, observer: ScanObserver) -> Iterator[None]:
    """
    Show the scans of a module's forward passes to an observer while the context is open.

    Args:
        module (`torch.nn.Module`): A module whose forward pass calls a registered scan.
        observer ([`~architectures.contract.ScanObserver`]): Is asked at each of the module's scans.
    """
    namespace = _forward_globals(module)
    names = list(_replacements_in(namespace))
    tokens = []

    def enter(*_: Any) -> None:
        tokens.append(_observer.set(observer))

    def leave(*_: Any) -> None:
        _observer.reset(tokens.pop())

    with _lock:
        for name in names:
            _install(namespace, name, _replacements_in(namespace)[name])
    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with _lock:
            for name in names:
                _remove(namespace, name)


def calls_registered_scan(module: nn.Module) -> bool:
    """Whether the module's forward pass uses a name that the switch can replace."""
    return bool(_replacements_in(_forward_globals(module)))


def _forward_globals(module: nn.Module) -> dict[str, Any]:
    # A subclass that inherits `forward` resolves names where `forward` was written, not where the subclass was; one
    # whose `forward` calls that of `super()` leaves the scan to a class further up.
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in type(module).__mro__ if "forward" in vars(cls)]
    for forward in forwards:
        calls_further_up = "__class__" in forward.__code__.co_freevars
        if _replacements_in(forward.__globals__) or not calls_further_up:
            return forward.__globals__
    return forwards[0].__globals__


def _default_sites() -> list[tuple[Owner, str, Replacement]]:
    sites: list[tuple[Owner, str, Replacement]] = []
    for module_name in _replacements:
        namespace = vars(importlib.import_module(module_name))
        for name, replacement in {**_companions.get(module_name, {}), **_replacements_in(namespace)}.items():
            class_name, _, attribute = name.rpartition(".")
            owner = namespace.get(class_name) if class_name else namespace
            if owner is not None and attribute in _names_of(owner):
                sites.append((owner, attribute, replacement))
    return sites


def _install_defaults() -> None:
    for site in _default_sites():
        _install(*site)


def _remove_defaults() -> None:
    for owner, name, _ in _default_sites():
        _remove(owner, name)


def _names_of(owner: Owner) -> Any:
    return owner if isinstance(owner, dict) else vars(owner)


def _rebind(owner: Owner, name: str, function: Callable[..., Any]) -> None:
    if isinstance(owner, dict):
        owner[name] = function
    else:
        setattr(owner, name, function)


def _install(owner: Owner, name: str, replacement: Replacement) -> None:
    key = (id(owner), name)
    _, stock, users = _installed.get(key, (owner, _names_of(owner)[name], 0))
    if users == 0:
        _rebind(owner, name, replacement(stock))
    _installed[key] = (owner, stock, users + 1)


def _remove(owner: Owner, name: str) -> None:
    key = (id(owner), name)
    _, stock, users = _installed[key]
    if users == 1:
        _rebind(owner, name, stock)
        del _installed[key]
    else:
        _installed[key] = (owner, stock, users - 1)
