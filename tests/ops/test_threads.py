"""Kernels from several threads, in forked processes, and with another number of threads."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_compressm.ops import _threads, selective_scan
from hf_compressm.ops._selective_scan_numba import scan_backward

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="fork is the default on Linux only")


def gradients(arguments: dict[str, Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments.values()]
    y, final_state = selective_scan(*leaves)
    return [y, *torch.autograd.grad(y.square().sum() + final_state.sum(), leaves)]


class ScannedSequences(Dataset):
    """Runs a scan wherever its items are made."""

    def __init__(self, arguments: dict[str, Tensor]) -> None:
        self.arguments = arguments

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return selective_scan(**self.arguments)[0] + index


@pytest.mark.usefixtures("two_threads")
def test_every_unit_runs_once_and_on_both_threads() -> None:
    seen = []

    def unit(number: int) -> None:
        seen.append((number, threading.get_ident()))
        time.sleep(0.01)

    _threads.run_units(unit, [(number,) for number in range(20)])
    assert sorted(number for number, _ in seen) == list(range(20))
    assert len({thread for _, thread in seen}) == 2


@pytest.mark.usefixtures("two_threads")
def test_units_may_use_threads_themselves() -> None:
    done = []

    def inner(number: int) -> None:
        done.append(number)

    def outer(number: int) -> None:
        _threads.run_units(inner, [(10 * number + digit,) for digit in range(4)])

    # Enough of them to keep every thread of the pool waiting if one could wait for another.
    _threads.run_units(outer, [(number,) for number in range(50)])
    assert sorted(done) == sorted(10 * number + digit for number in range(50) for digit in range(4))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", [0, 1, 7])
def test_an_error_in_a_unit_is_raised_after_all_threads_have_stopped(failing) -> None:
    running = set()

    def unit(number: int) -> None:
        running.add(number)
        time.sleep(0.005)
        running.discard(number)
        if number == failing:
            raise ValueError(f"unit {number}")

    with pytest.raises(ValueError, match=f"unit {failing}"):
        _threads.run_units(unit, [(number,) for number in range(8)])
    assert not running


def test_split_range() -> None:
    assert _threads.split_range(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert _threads.split_range(2, 5) == [(0, 1), (1, 2)]
    assert _threads.split_range(0, 5) == []


@pytest.mark.usefixtures("two_threads")
def test_concurrent_calls_from_python_threads(scan_arguments) -> None:
    cases = [scan_arguments(4, 70, 130, 4 + seed % 3, seed=seed) for seed in range(8)]
    expected = [gradients(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(pool.map(gradients, cases), expected):
                assert all(torch.equal(a, b) for a, b in zip(actual, wanted))


@pytest.mark.usefixtures("two_threads")
def test_backward_pass_in_another_thread(scan_arguments) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in scan_arguments(4, 70, 130, 4).items()}
    y, _ = selective_scan(**arguments)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert all(tensor.grad is not None for tensor in arguments.values())


def test_results_repeat_exactly_and_outputs_do_not_depend_on_the_threads(scan_arguments, threads) -> None:
    arguments = scan_arguments(3, 130, 130, 6)
    first, second = gradients(arguments), gradients(arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    torch.set_num_threads(3)
    other = gradients(arguments)
    # y, and the gradients of u and delta; those of A, B and C are sums over units.
    assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3]))
    for a, b in zip(first, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("batch", "channels"), [(8, 64), (1, 300), (2, 300)])
def test_units_that_add_to_the_same_numbers_have_copies_of_their_own(
    scan_arguments, monkeypatch, batch, channels
) -> None:
    calls = []
    scan = sys.modules[selective_scan.__module__]
    monkeypatch.setattr(scan, "run_units", lambda kernel, units: calls.append((kernel, units)))
    gradients(scan_arguments(batch, 10, channels, 3))
    ((_, units),) = [call for call in calls if call[0] is scan_backward]
    assert len(units) == 4
    for i, unit in enumerate(units):
        for other in units[:i]:
            (*_, grad_A, grad_B, grad_C, grad_beside, _, sequences, blocks) = unit
            (*_, other_A, other_B, other_C, other_beside, _, other_sequences, other_blocks) = other
            assert (sequences, blocks) != (other_sequences, other_blocks)
            assert not (blocks == other_blocks and np.shares_memory(grad_A, other_A))
            assert not (blocks == other_blocks and np.shares_memory(grad_beside, other_beside))
            assert not (sequences == other_sequences and np.shares_memory(grad_B, other_B))
            assert not (sequences == other_sequences and np.shares_memory(grad_C, other_C))


@needs_fork
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads_in_worker", [1, 2])
def test_data_loader_workers_after_the_pool_was_used(scan_arguments, threads_in_worker) -> None:
    arguments = scan_arguments(2, 10, 130, 3)
    expected, _ = selective_scan(**arguments)
    assert _threads._executor is not None
    loader = DataLoader(
        ScannedSequences(arguments),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=60,
        worker_init_fn=lambda _: torch.set_num_threads(threads_in_worker),
    )
    for index, item in enumerate(loader):
        assert torch.equal(item, expected + index)
        # The training process goes on scanning while workers run.
        assert torch.equal(selective_scan(**arguments)[0], expected)


def _exit_with_outcome(arguments: dict[str, Tensor], expected: Tensor) -> None:
    sys.exit(0 if torch.equal(selective_scan(**arguments)[0], expected) else 3)


@needs_fork
@pytest.mark.usefixtures("two_threads")
def test_fork_while_another_thread_is_scanning(scan_arguments) -> None:
    arguments = scan_arguments(2, 10, 130, 3)
    expected, _ = selective_scan(**arguments)
    stop = threading.Event()

    def keep_scanning() -> None:
        while not stop.is_set():
            selective_scan(**arguments)

    thread = threading.Thread(target=keep_scanning)
    thread.start()
    try:
        children = []
        for _ in range(4):
            child = multiprocessing.get_context("fork").Process(target=_exit_with_outcome, args=(arguments, expected))
            child.start()
            children.append(child)
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * 4
    finally:
        stop.set()
        thread.join()
        for child in children:
            child.kill()
