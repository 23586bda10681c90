"""Cuts under DistributedDataParallel over NCCL, against one GPU on the joint batch; skipped below two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.processes import largest_difference, launch, result

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TOGETHER = ("mamba", "mamba2", "no_unused", "accumulation", "static_graph")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("several_gpus")
    for processes, cases in ((1, ("mamba", "mamba2")), (2, (*TOGETHER, "without_rebuild"))):
        devices = ",".join(map(str, range(processes)))
        run = launch(path, cases, processes, DEVICE="cuda", CUDA_VISIBLE_DEVICES=devices)
        assert run.returncode == 0, run.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", TOGETHER)
def test_they_end_as_one_gpu_on_the_joint_batch(folder: Path, case: str) -> None:
    first, second = (result(folder, case, 2, rank) for rank in (0, 1))
    expected = result(folder, "mamba2" if case == "mamba2" else "mamba", 1, 0)
    assert first["sizes"] == second["sizes"] == [4, 4]
    assert largest_difference(first, second) == 0
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert largest_difference(expected, first) < 5e-4


def test_without_a_new_reducer_the_processes_drift_apart(folder: Path) -> None:
    assert largest_difference(*(result(folder, "without_rebuild", 2, rank) for rank in (0, 1))) > 1e-4
