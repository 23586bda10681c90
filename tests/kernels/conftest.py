"""Skips the tests of this folder where Triton's interpreter is not asked for; `make test-kernels` asks for it."""

from __future__ import annotations

from collections import Counter

import pytest

from . import interpreter


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    if not interpreter.is_asked_for():
        pytest.skip("needs TRITON_INTERPRET=1, triton, mamba-ssm and flash-linear-attention: make test-kernels")


@pytest.fixture
def launched(_interpreted: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched in this test, by its name."""
    from triton.runtime.interpreter import GridExecutor

    counts, launch = Counter(), GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        counts[self.fn.__name__] += 1
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counts
