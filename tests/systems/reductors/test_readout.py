"""The readout fitted to the outputs: against numpy's least squares, simulations, and where it must do nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hf_compressm.errors import DimensionError, NotFiniteError, TruncationError
from hf_compressm.systems import (
    OutputSamples,
    Truncation,
    balancing_truncation,
    fit_readout,
    fit_readouts,
    hankel_decomposition,
    interpolative_truncation,
)
from hf_compressm.systems.reductors import readout


def samples(
    seed: int = 0, steps: int = 400, channels: int = 3, N: int = 8, held_out: float = 0.0, rank: int | None = None
) -> OutputSamples:
    """States whose mixture moves with what reads them, so that regression and fit differ."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(0, 3, (steps,), generator=generator)
    mixing = torch.randn(3, rank or N, N, generator=generator, dtype=torch.float64)
    hidden = torch.randn(steps, channels, rank or N, generator=generator, dtype=torch.float64)
    readout = torch.randn(steps, N, generator=generator, dtype=torch.float64)
    readout = readout * torch.rand(3, N, generator=generator, dtype=torch.float64)[mode]
    return OutputSamples(
        readout,
        hidden @ mixing[mode if rank is None else torch.zeros_like(mode)],
        torch.rand(steps, channels, generator=generator, dtype=torch.float64),
        torch.rand(steps, generator=generator) < held_out,
    )


def gramians(found: OutputSamples) -> tuple[torch.Tensor, torch.Tensor]:
    rows = found.states.flatten(0, 1)
    return rows.mT @ rows / len(rows), found.readout.mT @ found.readout / len(found.readout)


def output_error(truncation: Truncation, found: OutputSamples, steps: torch.Tensor | slice = slice(None)) -> float:
    """Step by step and channel by channel, as the layer computes it."""
    C, h, w = (part[steps].double().numpy() for part in (found.readout, found.states, found.weights))
    T, W = truncation.T.numpy(), truncation.W.numpy()
    return sum(
        w[k, d] * (C[k] @ h[k, d] - (T.T @ C[k]) @ (W.T @ h[k, d])) ** 2
        for k in range(len(C))
        for d in range(h.shape[1])
    )


def truncations(found: OutputSamples, r: int) -> list[Truncation]:
    P, R = gramians(found)
    return [interpolative_truncation(P, R, r), balancing_truncation(hankel_decomposition(P, R), r)]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_against_numpys_least_squares(seed: int, kind: int) -> None:
    """On the explicit features `C_n (W^T h)_j`, with `W^T T = I` by elimination."""
    found = samples(seed)
    truncation = truncations(found, 3)[kind]
    T, W = truncation.T.numpy(), truncation.W.numpy()
    free = np.linalg.svd(W.T)[2][3:].T
    C, h, w = (part.numpy() for part in (found.readout, found.states, found.weights))
    left = np.einsum("kn,kdn->kd", C, h) - np.einsum("kr,kdr->kd", C @ T, h @ W)
    features = np.einsum("kn,kdr->kdnr", C @ free, h @ W) * np.sqrt(w)[..., None, None]
    added = np.linalg.lstsq(features.reshape(left.size, -1), (left * np.sqrt(w)).ravel(), rcond=None)[0]
    expected = T + free @ added.reshape(free.shape[1], 3)
    fitted = fit_readout(truncation, found, ridge=0.0)
    np.testing.assert_allclose(fitted.T.numpy(), expected, atol=1e-3 * np.abs(expected).max())
    best = output_error(Truncation(torch.from_numpy(expected), truncation.W), found)
    assert output_error(fitted, found) == pytest.approx(best, rel=1e-4)
    assert torch.equal(fitted.W, truncation.W)
    assert output_error(fitted, found) < 0.97 * output_error(truncation, found)


@pytest.mark.parametrize("kind", [0, 1])
def test_redundant_states_stay_exact(kind: int) -> None:
    found = samples(rank=3)
    truncation = truncations(found, 3)[kind]
    scale = output_error(Truncation.from_indices([0], full_size=8, T=torch.eye(8)[:, :1].double()), found)
    for fitted in (truncation, fit_readout(truncation, found)):
        assert output_error(fitted, found) < 1e-12 * scale


def test_redundancy_that_the_regression_does_not_see() -> None:
    """The dropped state is read only where it equals the kept one; elsewhere it is something else."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 4, 2, generator=generator, dtype=torch.float64)
    h[:100, :, 1] = h[:100, :, 0]
    readout = torch.ones(200, 2, dtype=torch.float64)
    readout[100:, 1] = 0
    found = OutputSamples(readout, h, torch.ones(200, 4), torch.zeros(200, dtype=torch.bool))
    P, _ = gramians(found)
    regression = Truncation.from_indices([0], 2, T=torch.stack([torch.ones(1), P[1, :1] / P[0, 0]]).double())
    assert output_error(regression, found) > 10
    assert output_error(fit_readout(regression, found, ridge=0.0), found) < 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), r=st.integers(1, 8), decades=st.sampled_from([0, 3, 6]), steps=st.integers(4, 60))
def test_never_worse_in_any_units(seed: int, r: int, decades: int, steps: int) -> None:
    """Few steps, many unknowns, states of any size."""
    found = samples(seed, steps=steps, held_out=0.4)
    units = 10 ** (decades * torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    found = OutputSamples(found.readout / units, found.states * units, found.weights, found.held_out)
    try:
        made = truncations(found, r)
    except TruncationError:
        # A few steps may not excite as many states.
        reject()
    for truncation in made:
        fitted = fit_readout(truncation, found)
        if truncation.indices is not None:
            assert torch.equal(fitted.T[truncation.indices], torch.eye(r, dtype=torch.float64))
        before, after = (output_error(each, found) for each in (truncation, fitted))
        assert after <= before * (1 + 1e-6) + 1e-12


def test_a_fit_that_does_not_generalise_is_not_taken() -> None:
    """Readout and state are independent of each other, so that the regression is the best there is."""
    generator = torch.Generator().manual_seed(0)
    readout, states = (torch.randn(*size, 8, generator=generator).double() for size in ((12,), (12, 1)))
    everything = OutputSamples(readout, states, torch.ones(12, 1), torch.arange(12) % 2 == 0)
    truncation = Truncation.from_indices([0, 1, 2], full_size=8)
    followed = fit_readout(truncation, OutputSamples(readout, states, torch.ones(12, 1), torch.zeros(12).bool()))
    stopped = fit_readout(truncation, everything)
    size = [(each.T - truncation.T).norm() for each in (stopped, followed)]
    assert size[0] < 0.5 * size[1]


def test_more_states_leave_less() -> None:
    found = samples(3, steps=1500)
    errors = [output_error(fit_readout(truncations(found, r)[0], found), found) for r in range(1, 9)]
    assert all(later <= earlier * 1.001 for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 1e-12 * errors[0]


def test_units_decide_nothing() -> None:
    found = samples(1)
    units = 10.0 ** torch.arange(-3, 5, dtype=torch.float64)
    other = OutputSamples(found.readout / units, found.states * units, found.weights, found.held_out)
    one, two = (fit_readout(truncations(each, 3)[0], each) for each in (found, other))
    assert output_error(one, found) == pytest.approx(output_error(two, other), rel=1e-5)


def test_a_batch_is_fitted_one_by_one_and_only_T_changes() -> None:
    parts = [samples(seed, held_out=0.3) for seed in range(2)]
    together = OutputSamples(
        *(torch.stack([getattr(p, n) for p in parts]) for n in ("readout", "states", "weights", "held_out"))
    )
    alone = [truncations(part, 3)[0] for part in parts]
    batch = Truncation.from_indices(
        torch.stack([t.indices for t in alone]), 8, T=torch.stack([t.T for t in alone]),
        shares=torch.stack([t.shares for t in alone]),
    )  # fmt: skip
    fitted = fit_readout(batch, together)
    for number, (truncation, part) in enumerate(zip(alone, parts)):
        torch.testing.assert_close(fitted.T[number], fit_readout(truncation, part).T)
    assert torch.equal(fitted.shares, batch.shares) and torch.equal(fitted.indices, batch.indices)


def test_nothing_to_fit() -> None:
    found = samples(held_out=0.3)
    whole = Truncation.from_indices(range(8), full_size=8)
    assert fit_readout(whole, found) is whole
    truncation = truncations(found, 3)[0]
    unread = OutputSamples(found.readout, found.states, torch.zeros_like(found.weights), found.held_out)
    assert torch.equal(fit_readout(truncation, unread).T, truncation.T)
    silent = OutputSamples(found.readout, torch.zeros_like(found.states), found.weights, found.held_out)
    assert torch.equal(fit_readout(truncation, silent).T, truncation.T)


def test_samples_that_do_not_fit_are_refused() -> None:
    found = samples()
    with pytest.raises(DimensionError, match="of the same systems"):
        fit_readout(Truncation.from_indices([0], full_size=7), found)
    with pytest.raises(DimensionError, match="do not fit"):
        OutputSamples(found.readout, found.states[..., :7], found.weights, found.held_out)
    with pytest.raises(NotFiniteError):
        OutputSamples(found.readout * float("nan"), found.states, found.weights, found.held_out)


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_several_systems_at_once_are_each_fitted_alone(held_out: float, monkeypatch) -> None:
    seen = [samples(seed, held_out=held_out) for seed in range(3)] + [samples(7, N=6, held_out=held_out)]
    # As many held-out steps in each, as a layer's samples have; and one that converges before the others.
    for number, each in enumerate(seen):
        each.held_out.copy_(torch.arange(len(each.readout)) % 4 == number if held_out else each.held_out)
    seen[1].weights.zero_()
    cuts = [truncations(each, 3)[number % 2] for number, each in enumerate(seen)]
    alone = [fit_readout(cut, each) for cut, each in zip(cuts, seen)]
    monkeypatch.setattr(readout, "_ON_A_CPU", 8)
    for one, other, cut in zip(alone, fit_readouts(cuts, seen), cuts, strict=True):
        assert torch.allclose(one.T, other.T, rtol=1e-9, atol=1e-12)
        assert torch.equal(other.W, cut.W)
    assert torch.equal(alone[1].T, cuts[1].T) and not torch.allclose(alone[0].T, cuts[0].T, atol=1e-3)


def test_systems_with_other_counts_of_held_out_steps(monkeypatch) -> None:
    monkeypatch.setattr(readout, "_ON_A_CPU", 8)
    seen = [samples(seed, held_out=0.2 + 0.2 * seed) for seed in range(2)]
    cuts = [truncations(each, 3)[0] for each in seen]
    for cut, fitted, each in zip(cuts, fit_readouts(cuts, seen), seen):
        alone = output_error(fit_readout(cut, each), each)
        assert output_error(fitted, each) < 1.01 * alone < 0.98 * output_error(cut, each)


def test_no_systems_and_systems_of_full_size() -> None:
    assert fit_readouts([], []) == []
    whole = Truncation.from_indices(range(8), full_size=8)
    assert fit_readouts([whole], [samples()])[0] is whole
