"""What all tests share."""

from __future__ import annotations

import gc
import logging
import os
import sys

# Two test processes share the machine; more threads than cores make everything slower. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# transformers looks for them where a model is first imported; None says that there are none.
if os.environ.get("HIDE_MAMBA_SSM"):
    sys.modules.update(dict.fromkeys(("mamba_ssm", "causal_conv1d")))

import pytest  # noqa: E402
import torch  # noqa: E402

from .kernels import interpreter  # noqa: E402

if interpreter.is_asked_for():
    interpreter.install()

from hf_compressm import disable_fast_cpu_scan  # noqa: E402

# Saved folders carry code of their own, in which no doctest is to be looked for.
collect_ignore_glob = ["fixtures/*"]


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_levels_as_they_were():
    yield
    # A quiet command silences the library for its whole process.
    logging.getLogger("hf_compressm").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _stock_scan_afterwards():
    yield
    # What a Trainer with a callback switched on stays on for its evaluation.
    disable_fast_cpu_scan()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: no collection of garbage, of which every Trainer asks for one, need look at it."""
    gc.collect()
    gc.freeze()
