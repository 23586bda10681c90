"""Sampled states against the outputs of the scan: a readout of one entry shows one state."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import (
    _diagonal_pieces,
    _gramians_cpu,
    diagonal_scan_reference,
    sample_times,
    sampled_diagonal_states,
    sampled_states,
    selective_scan_reference,
)

from .conftest import state_kernels

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 130, 70, 5), (1, 129, 200, 9)]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", state_kernels(), ids=lambda module: module.__name__[25:])


def all_states(u, delta, A, B) -> torch.Tensor:
    """(batch, length, channels, N), from the outputs of scans that read one state each."""
    unit = torch.eye(A.shape[1], dtype=u.dtype).expand(*u.shape[:2], -1, -1)
    return torch.stack([selective_scan_reference(u, delta, A, B, unit[..., n, :])[0] for n in range(A.shape[1])], -1)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_against_the_scan(scan_arguments, implementation, shape, dtype, tolerance) -> None:
    arguments = scan_arguments(*shape, dtype=dtype)
    u, delta, A, B = (arguments[name] for name in ("u", "delta", "A", "B"))
    times = sample_times(*shape[:2], max(1, shape[1] // 3), torch.Generator().manual_seed(1))
    expected = torch.stack([states[steps] for states, steps in zip(all_states(u, delta, A, B), times)])
    found = implementation.sampled_states(delta, delta * u, A, B, times)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(
        sampled_states(u, delta, A, B, times), _gramians_cpu.sampled_states(delta, delta * u, A, B, times)
    )


@IMPLEMENTATIONS
def test_chunks_are_pieced_together(scan_arguments, monkeypatch, implementation) -> None:
    arguments = scan_arguments(3, 150, 10, 4, dtype=torch.float64)
    u, delta, A, B = (arguments[name] for name in ("u", "delta", "A", "B"))
    times = sample_times(3, 150, 40)
    expected = implementation.sampled_states(delta, delta * u, A, B, times)
    for name in ("_CHUNK_ELEMENTS", "_BUFFER_ELEMENTS"):
        monkeypatch.setattr(implementation, name, 64 * 4 * 3, raising=False)
    assert torch.allclose(implementation.sampled_states(delta, delta * u, A, B, times), expected, rtol=1e-12)


def test_narrow_types_are_widened(scan_arguments) -> None:
    arguments = scan_arguments(2, 9, 3, 4, dtype=torch.bfloat16)
    u, delta, A, B = (arguments[name] for name in ("u", "delta", "A", "B"))
    wide = [tensor.float() for tensor in (u, delta, A, B)]
    times = torch.tensor([[0, 8], [3, 4]])
    assert torch.equal(sampled_states(u, delta, A, B, times), sampled_states(*wide, times))


def test_bad_arguments(scan_arguments) -> None:
    arguments = scan_arguments(2, 9, 3, 4)
    u, delta, A, B = (arguments[name] for name in ("u", "delta", "A", "B"))
    with pytest.raises(DimensionError, match="`delta` has shape"):
        sampled_states(u, delta[:, 1:], A, B, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(DimensionError, match="ascending steps from 0 to 8"):
        sampled_states(u, delta, A, B, torch.full((2, 1), 9))
    with pytest.raises(ConfigurationError, match="dtype torch.int64"):
        sampled_states(u.long(), delta, A, B, torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_diagonal_states_are_those_of_a_loop(by_channel, piece, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lam = 0.9 * torch.exp(1j * torch.rand((3, 5) if by_channel else (5,), generator=generator, dtype=torch.float64))
    B = torch.randn((3, 5) if by_channel else (5, 3), generator=generator, dtype=torch.complex128)
    u = torch.randn(2, 31, 3, generator=generator)
    times = sample_times(2, 31, 9, generator)
    monkeypatch.setattr(_diagonal_pieces, "_PIECE_STATES", piece * 2 * lam.numel())
    drive = (u.double().unsqueeze(-1) * B).flatten(2) if by_channel else u.to(B.dtype) @ B.mT
    states = diagonal_scan_reference(lam.flatten(), drive).unflatten(-1, lam.shape)
    found = sampled_diagonal_states(u, lam, B, times)
    assert torch.allclose(found, torch.stack([one[steps] for one, steps in zip(states, times)]), rtol=1e-12)


def test_diagonal_states_check_their_arguments() -> None:
    u, lam, B = torch.zeros(2, 5, 3), torch.zeros(4, dtype=torch.complex64), torch.zeros(4, 2, dtype=torch.complex64)
    with pytest.raises(DimensionError, match="`B` has shape"):
        sampled_diagonal_states(u, lam, B, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(DimensionError, match="`times`"):
        sampled_diagonal_states(u, lam, torch.zeros(4, 3), torch.full((2, 1), 5))
