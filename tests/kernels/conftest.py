"""Skips the tests of this folder where Triton's interpreter is not asked for; `make test-kernels` asks for it."""

from __future__ import annotations

import pytest

from . import interpreter


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    if not interpreter.is_asked_for():
        pytest.skip("needs TRITON_INTERPRET=1, triton, mamba-ssm and flash-linear-attention: make test-kernels")
