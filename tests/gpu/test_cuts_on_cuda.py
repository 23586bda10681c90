"""A cut on a GPU is the cut on a CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from tests.cases import CASES, Case, case_id

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("stock", [False, True], ids=["mixed", "stock"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_cut_on_a_gpu_is_that_on_a_cpu(case: Case, stock: bool) -> None:
    records = []
    for device in ("cpu", "cuda"):
        model, batch = case.build().to(device), {name: value.to(device) for name, value in case.batch().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        loss = model(**batch)
        (loss.loss if hasattr(loss, "loss") else loss[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, stock=stock)
        records.append(compress(model, [batch], config, optimizer=optimizer))
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        for parameter, state in optimizer.state.items():
            assert {value.shape for value in state.values() if value.dim()} <= {parameter.shape}
    here, there = records
    assert here.outcome == there.outcome == "cut"
    assert there.loss_before == pytest.approx(here.loss_before, rel=1e-3)
    assert there.loss_after == pytest.approx(here.loss_after, rel=1e-2)
    for one, other in zip(here.layers, there.layers, strict=True):
        assert one.size_after == other.size_after
        largest = one.hankel_singular_values[0]
        assert other.hankel_singular_values == pytest.approx(one.hankel_singular_values, rel=1e-2, abs=1e-3 * largest)
