"""What takes long shows how far it is, and only where it is asked to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress
from tests.cases import tiny_lru, token_batch
from tests.selective_models import tiny_jamba

HALF = CompreSSMConfig(ratio=0.5, fit_readout=True)


@pytest.mark.parametrize("build", [tiny_lru, tiny_jamba])
def test_a_cut_and_its_fit_show_how_far_they_are(build: Callable[[], PreTrainedModel], capsys) -> None:
    assert compress(build(), [token_batch()], HALF, progress=True).outcome == "cut"
    shown = capsys.readouterr().err
    assert [word for word in ("calibrating", "cutting", "fitting") if word not in shown] == []
    assert compress(build(), [token_batch()], HALF, progress=False).outcome == "cut"
    assert capsys.readouterr().err == ""
