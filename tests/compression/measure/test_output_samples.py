"""Sampled outputs of a scan: what is sampled is what the scan computes, and a fit to it lowers the layer's error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_compressm.architectures import DeltaRuleInputs, MultiHeadScanInputs, ScanInputs, SelectiveScanInputs
from hf_compressm.compression.measure import output_samples
from hf_compressm.compression.measure.output_samples import joined, sample_outputs, side_by_side
from hf_compressm.ops import multi_head_scan_reference, selective_scan_reference
from hf_compressm.systems import OutputSamples


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def selective(batch: int = 6, length: int = 20, channels: int = 5, N: int = 4) -> SelectiveScanInputs:
    steps = (batch, length)
    A = -normal(channels, N, seed=1).exp()
    return SelectiveScanInputs(
        normal(*steps, channels), normal(*steps, channels, seed=2).exp(), A, normal(*steps, N, seed=3),
        normal(*steps, N, seed=4),
    )  # fmt: skip


def multi_head(batch: int = 6, length: int = 20, N: int = 4) -> MultiHeadScanInputs:
    """Four heads of three channels, in two groups."""
    steps = (batch, length)
    return MultiHeadScanInputs(
        normal(*steps, 4, 3), normal(*steps, 4, seed=2).exp(), -normal(4, seed=1).exp(), normal(*steps, 2, N, seed=3),
        normal(*steps, 2, N, seed=4),
    )  # fmt: skip


def output_of(inputs: ScanInputs) -> Tensor:
    if isinstance(inputs, SelectiveScanInputs):
        return selective_scan_reference(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C)[0]
    return multi_head_scan_reference(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C)[0]


@pytest.mark.parametrize("make", [selective, multi_head])
def test_outputs_of_the_samples_are_outputs_of_the_scan(make: Callable[[], ScanInputs]) -> None:
    """The weight of a sample is a square of the gradient; with the output for a gradient it is the output's square."""
    inputs = make()
    samples = sample_outputs(inputs, output_of(inputs), generator(), weight=2.0)
    outputs = (samples.states @ samples.readout.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(samples.weights, 2 * outputs.square(), rtol=1e-3, atol=1e-5 * float(outputs.square().max()))
    groups = () if make is selective else (2,)
    assert samples.readout.shape == (*groups, 120, 4)
    assert samples.states.shape == (*groups, 120, 5 if make is selective else 6, 4)


def test_all_channels_and_steps_are_there_where_they_fit() -> None:
    inputs = selective()
    samples = sample_outputs(inputs, torch.ones_like(inputs.u), generator())
    found = (samples.states @ samples.readout.unsqueeze(-1)).squeeze(-1)
    expected = output_of(inputs)
    assert torch.allclose(found.sort().values.sum(0), expected.flatten(0, 1).sort().values.sum(0).float(), rtol=1e-3)


def test_other_sequences_are_held_out() -> None:
    inputs = selective(batch=8)
    samples = sample_outputs(inputs, torch.ones_like(inputs.u), generator())
    by_sequence = samples.held_out.reshape(8, -1)
    assert by_sequence.any(1).sum() == by_sequence.all(1).sum() == 2
    samples = sample_outputs(selective(batch=1), torch.ones(1, 20, 5), generator())
    assert samples.held_out.tolist() == [False] * 15 + [True] * 5


@pytest.mark.parametrize("make", [selective, multi_head])
def test_memory_is_bounded(make: Callable[..., ScanInputs], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(batch=50, length=7)
    monkeypatch.setattr(output_samples, "_NUMBERS", 1000)
    samples = sample_outputs(inputs, output_of(inputs), generator())
    assert 500 < samples.states.numel() <= 1000
    for passes in (2, 3):
        samples = joined(samples, sample_outputs(inputs, output_of(inputs), generator(passes)), passes, generator())
        assert 500 < samples.states.numel() <= 1000


def test_every_pass_has_an_equal_share() -> None:
    found = None
    for number in range(1, 5):
        steps = torch.full((40, 3), float(number))
        one = OutputSamples(steps, steps[:, None], torch.ones(40, 1), torch.zeros(40, dtype=torch.bool))
        found = joined(found, one, number, generator(number))
    counts = [int((found.readout[:, 0] == number).sum()) for number in range(1, 5)]
    assert sum(counts) == 40
    assert counts[3] == 10
    assert min(counts) >= 5


def test_a_recurrence_without_channels_has_no_samples() -> None:
    k = torch.nn.functional.normalize(normal(2, 9, 1, 4), dim=-1)
    inputs = DeltaRuleInputs(k, k, normal(2, 9, 1, 4), torch.zeros(2, 9, 1), torch.ones(2, 9, 1))
    assert sample_outputs(inputs, normal(2, 9, 1, 4), generator()) is None
    assert joined(None, None, 1, generator()) is None


def test_a_gradient_that_overflows_has_no_samples() -> None:
    inputs = selective()
    assert sample_outputs(inputs, torch.full_like(inputs.u, float("inf")), generator()) is None


def test_parts_are_side_by_side_where_all_have_samples() -> None:
    inputs = selective()
    one = sample_outputs(inputs, output_of(inputs), generator())
    assert side_by_side([one, one]).states.shape == (2, *one.states.shape)
    assert side_by_side([one, None]) is None
