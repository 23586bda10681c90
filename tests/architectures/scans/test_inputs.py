"""What scans tell of themselves: sizes, and the systems of their averages."""

from __future__ import annotations

import torch

from hf_compressm.architectures import MultiHeadScanInputs, SelectiveScanInputs
from hf_compressm.systems import DiagonalLTI


def multi_head_inputs(batch: int = 2, length: int = 9) -> MultiHeadScanInputs:
    """Four heads of three channels in two groups, five states."""
    return MultiHeadScanInputs(
        u=torch.randn(batch, length, 4, 3),
        delta=torch.rand(batch, length, 4),
        A=-torch.rand(4),
        B=torch.randn(batch, length, 2, 5, requires_grad=True),
        C=torch.randn(batch, length, 2, 5),
        part=3,
    )


def test_sizes() -> None:
    inputs = multi_head_inputs()
    assert (inputs.state_size, inputs.states_per_sequence, inputs.rows) == (5, 4 * 3 * 5, 2 * 9 * 2 * 3)
    selective = SelectiveScanInputs(
        torch.zeros(2, 9, 7), torch.zeros(2, 9, 7), torch.zeros(7, 5), torch.zeros(2, 9, 5), torch.zeros(2, 9, 5)
    )
    assert (selective.state_size, selective.states_per_sequence, selective.rows) == (5, 7 * 5, 2 * 9 * 7)
    detached = inputs.detached()
    assert inputs.B.requires_grad and not detached.B.requires_grad and detached.part == 3


def test_a_batch_without_rows_has_sizes_and_no_sampled_step() -> None:
    inputs = multi_head_inputs(batch=0)
    assert (inputs.states_per_sequence, inputs.rows, inputs.channel_count) == (4 * 3 * 5, 0, 6)
    times = inputs.sample_times(torch.Generator())
    assert times.shape[0] == 0 and not inputs.detached().state_gramian(times)[0].any()


def test_the_averaged_systems_of_a_multi_head_scan() -> None:
    """One system a head, with the means of its time step and of its group's B and C."""
    inputs = multi_head_inputs()
    sums = inputs.sums()
    systems = inputs.averaged_systems()(sums[:-1] / sums[-1])
    assert systems.lam.shape == (2, 2, 5)
    P = systems.controllability_gramian()
    for head in range(4):
        group = head // 2
        delta = inputs.delta.double().mean((0, 1))[head]
        b, c = (M.detach().double().mean((0, 1))[group] for M in (inputs.B, inputs.C))
        lam = torch.exp(delta * inputs.A[head].double()).expand(5)
        single = DiagonalLTI(lam, (delta * b)[:, None], c[None])
        torch.testing.assert_close(P[group, head % 2], single.controllability_gramian())
        torch.testing.assert_close(systems.C[group, head % 2], single.C)
