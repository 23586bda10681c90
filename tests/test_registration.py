"""`import hf_compressm` is enough for the Auto classes, in either order of imports, and is quick."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compressm._registration import is_announced

ROOT = Path(__file__).parent.parent

BEFORE = "import hf_compressm\nfrom transformers import CONFIG_MAPPING, AutoConfig\n"
AFTER = "from transformers import CONFIG_MAPPING, AutoConfig\nimport hf_compressm\n"
FINDS_THEM = """
import inspect, sys
from transformers.models.auto import configuration_auto
assert "hf_compressm.models" not in sys.modules and "bert" in CONFIG_MAPPING
assert "hf_compressm.models" not in sys.modules, "another model type does not import ours"
assert "class AutoConfig" in inspect.getsource(configuration_auto)
for model_type in sys.argv[1:]:
    config = AutoConfig.for_model(model_type)
    assert config.model_type == model_type and type(config).__module__.startswith("hf_compressm.")
"""


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("imports", [BEFORE, AFTER], ids=["before transformers", "after transformers"])
def test_the_auto_classes_find_the_models(imports: str) -> None:
    run(imports + FINDS_THEM, *registered_model_types())


@functools.cache
def registered_model_types() -> list[str]:
    """The model types that importing the models registers."""
    code = "import hf_compressm.models\nfrom transformers import CONFIG_MAPPING\nprint(*CONFIG_MAPPING._extra_content)"
    return run(code).split()


def test_every_model_type_is_announced_and_no_other() -> None:
    found = registered_model_types()
    assert {"lru", "compressed_mamba"} <= set(found) and all(map(is_announced, found))
    assert not any(map(is_announced, ("mamba", "bert", None)))


def test_the_import_brings_no_heavy_library() -> None:
    code = "import sys, hf_compressm\nprint(*({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules)))"
    assert run(code).split() == []
