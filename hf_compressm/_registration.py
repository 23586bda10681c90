"""
The Auto classes' knowledge of this library's model types.

transformers has no entry point for libraries with models of their own, and importing its Auto classes takes seconds.
So its list of configurations is made, as soon as it exists, to import `hf_compressm.models` when it is first asked for
one of these model types; that import registers them in the usual way.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIGURATIONS = "transformers.models.auto.configuration_auto"

_OWN = frozenset(["lru", "s4d", "mamba_classifier", "mamba2_classifier"])
_COMPRESSED = "compressed_"


def is_announced(model_type: object) -> bool:
    """
    Whether a model type is, or may be, one of this library: which stock types have a compressed one, its models know.

    Args:
        model_type (`object`): The name of a type of models.
    """
    return isinstance(model_type, str) and (model_type in _OWN or model_type.startswith(_COMPRESSED))


def announce_models() -> None:
    """Let the Auto classes find this library's models, whether transformers is imported already or will be."""
    loaded = sys.modules.get(AUTO_CONFIGURATIONS)
    if hasattr(loaded, "CONFIG_MAPPING"):
        _announce_to(loaded)
    sys.meta_path.insert(0, _AfterImport())


class _Registered(dict):
    """Configuration classes by model type; those of this library come when they are first asked for."""

    def __contains__(self, model_type: object) -> bool:
        if not super().__contains__(model_type) and is_announced(model_type):
            importlib.import_module("hf_compressm.models")
        return super().__contains__(model_type)


def _announce_to(auto_configurations: ModuleType) -> None:
    # Private API of transformers; the only one here. Without it, `import hf_compressm.models` is needed.
    mapping = auto_configurations.CONFIG_MAPPING
    registered = getattr(mapping, "_extra_content", None)
    if type(registered) is dict:
        mapping._extra_content = _Registered(registered)


class _AfterImport(MetaPathFinder):
    """Finds nothing by itself; what the other finders find for the Auto configurations is announced to once it ran."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_CONFIGURATIONS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AfterImport))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # On the loader itself, which this module has alone, so that it keeps its other abilities (`get_source`).
            spec.loader.exec_module = functools.partial(_run_and_announce, spec.loader.exec_module)
        return spec


def _run_and_announce(run: Any, module: ModuleType) -> None:
    run(module)
    _announce_to(module)
