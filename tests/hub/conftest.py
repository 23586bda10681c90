"""A Hub, a folder to work in, and a Python without this library."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path

import pytest

from .loopback import LoopbackHub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def stock_python(work) -> str:
    """A Python with every library of this one but hf_compressm."""
    venv.create(work / "stock", with_pip=False, symlinks=True)
    scheme = sysconfig.get_paths(vars={"base": str(work / "stock"), "platbase": str(work / "stock")})
    # A plain path: what an editable installation put there is not executed, so the library stays out of reach.
    (Path(scheme["purelib"]) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return str(work / "stock" / "bin" / "python")
