"""
hf_compressm: make a state-space model smaller and faster while it trains.

The public names are imported when they are first used, so that `import hf_compressm` is quick. It is also enough for
the Auto classes to find the models of `hf_compressm.models`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._registration import announce_models

__version__ = "0.1.0"

_HOMES = {
    "CheckRecord": ".compression",
    "CompreSSMCallback": ".training",
    "CompreSSMConfig": ".config",
    "CompreSSMError": ".errors",
    "RunReport": ".cards",
    "Spectrum": ".compression",
    "analyze": ".api",
    "compress": ".api",
    "disable_fast_cpu_scan": ".architectures",
    "enable_fast_cpu_scan": ".architectures",
    "fast_cpu_scan": ".architectures",
    "load_cut_layers": ".saving",
    "read_history": ".compression",
    "train_in_segments": ".training",
}

__all__ = [
    "CheckRecord",
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompreSSMError",
    "RunReport",
    "Spectrum",
    "analyze",
    "compress",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "fast_cpu_scan",
    "load_cut_layers",
    "read_history",
    "train_in_segments",
]

if TYPE_CHECKING:
    from .api import analyze, compress
    from .architectures import disable_fast_cpu_scan, enable_fast_cpu_scan, fast_cpu_scan
    from .cards import RunReport
    from .compression import CheckRecord, Spectrum, read_history
    from .config import CompreSSMConfig
    from .errors import CompreSSMError
    from .saving import load_cut_layers
    from .training import CompreSSMCallback, train_in_segments


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


announce_models()
