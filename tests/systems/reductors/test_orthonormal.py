"""The subspace that loses the least energy, against the definition, random starts, and delta rules run to the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import (
    Truncation,
    hankel_singular_values,
    interpolation_residual,
    oblique_truncation,
    orthonormal_truncation,
)
from hf_compressm.systems.reductors import orthonormal


def gramians(size: int, seed: int = 0, decades: float = 6.0, batch: tuple[int, ...] = (), rank: int | None = None):
    """Two Gramians whose eigenvalues lie powers of ten apart, in bases that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for _ in range(2):
        basis = torch.linalg.qr(torch.randn(*batch, size, size, generator=generator, dtype=torch.float64))[0]
        values = 10 ** -torch.linspace(0, decades, size, dtype=torch.float64)
        values[size if rank is None else rank :] = 0
        pair.append(basis * values @ basis.mT)
    return pair


def lost(P: Tensor, Q: Tensor, U: Tensor) -> Tensor:
    """`trace(Q E P E)`, straight from the definition."""
    E = torch.eye(P.shape[-1], dtype=P.dtype) - U @ U.mT
    return (Q @ E @ P @ E).diagonal(dim1=-2, dim2=-1).sum(-1)


def random_basis(size: int, r: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, r, generator=generator, dtype=torch.float64))[0]


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 20), data=st.data())
def test_it_is_orthonormal_and_loses_no_less_than_balanced_coordinates(size: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, size))
    P, Q = gramians(size, data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 3.0, 9.0, 30.0])))
    truncation = orthonormal_truncation(P, Q, r)
    assert torch.equal(truncation.T, truncation.W)
    torch.testing.assert_close(truncation.T.mT @ truncation.T, torch.eye(r, dtype=torch.float64))
    energies = hankel_singular_values(P, Q).square()
    share = interpolation_residual(P, Q, truncation)
    assert share >= float(energies[r:].sum() / energies.sum()) * (1 - 1e-9) - 1e-14
    assert share <= 1 + 1e-9


@pytest.mark.parametrize("r", [2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_no_random_start_ends_much_better(seed: int, r: int) -> None:
    P, Q = gramians(16, seed, decades=4)
    found = lost(P, Q, orthonormal_truncation(P, Q, r).T)
    pairs = orthonormal._Pairs(*(torch.linalg.cholesky(X)[None] for X in (P, Q)))
    starts = torch.stack([random_basis(16, r, 100 + i) for i in range(8)])
    many = orthonormal._Pairs(*(L.expand(8, -1, -1) for L in (pairs.L_P, pairs.L_Q)))
    others = lost(P, Q, orthonormal._descend(many, starts))
    assert found <= 1.1 * others.min()


@pytest.mark.parametrize("r", [2, 5, 12])
def test_it_ends_where_the_gradient_vanishes(r: int) -> None:
    """The derivative of the loss along random turns of the subspace, by differences."""
    P, Q = gramians(16, 7, decades=3)
    U = orthonormal_truncation(P, Q, r).T
    start = torch.linalg.qr(torch.randn(16, r, dtype=torch.float64))[0]
    step = 1e-4

    def slope(U: Tensor, seed: int) -> float:
        turn = torch.randn(16, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turn = turn - U @ (U.mT @ turn)
        ends = [lost(P, Q, torch.linalg.qr(U + sign * step * turn)[0]) for sign in (1, -1)]
        return abs(float(ends[0] - ends[1])) / (2 * step)

    assert max(slope(U, i) for i in range(5)) <= 2e-2 * max(slope(start, i) for i in range(5))


def test_the_loss_never_rises(monkeypatch) -> None:
    P, Q = gramians(24, 3, batch=(2, 3))
    losses = []
    search = orthonormal._search

    def note(pairs, U, before, direction, slope):
        reached, after = search(pairs, U, before, direction, slope)
        losses.append((before.flatten(), after.flatten()))
        torch.testing.assert_close(after, pairs.lost(reached))
        return reached, after

    monkeypatch.setattr(orthonormal, "_search", note)
    truncation = orthonormal_truncation(P, Q, 6)
    assert truncation.T.shape == (2, 3, 24, 6) and len(losses) > 5
    assert all((after <= before).all() for before, after in losses)
    # First from three starts of each of the six pairs, then from the best of them.
    assert [len(before) for before, _ in losses[:9]] == [18] * 8 + [6]
    best = losses[7][1].unflatten(0, (3, 6)).min(0).values
    torch.testing.assert_close(losses[8][0], best)
    assert (losses[-1][1] < best).all()


def test_a_batch_is_cut_pair_by_pair() -> None:
    P, Q = gramians(10, 5, batch=(3,))
    together = orthonormal_truncation(P, Q, 4).T
    for i in range(3):
        alone = orthonormal_truncation(P[i], Q[i], 4).T
        assert abs(lost(P[i], Q[i], together[i]) / lost(P[i], Q[i], alone) - 1) < 1e-2


def test_units_of_the_loss_change_nothing() -> None:
    P, Q = gramians(10, 5)
    one, other = (lost(P, Q, orthonormal_truncation(a * P, Q / a, 4).T) for a in (1, 2.0**40))
    assert abs(one / other - 1) < 1e-6


def test_the_kept_states_are_uncorrelated_the_largest_first() -> None:
    P, Q = gramians(10, 6)
    U = orthonormal_truncation(P, Q, 4).T
    kept = U.mT @ P @ U
    variances = kept.diagonal()
    assert (variances.diff() <= 0).all()
    assert (kept - variances.diag()).abs().max() <= 1e-12 * variances[0]


def test_fewer_directions_than_asked_for_are_filled_up_and_lose_nothing() -> None:
    P, Q = gramians(12, 1, decades=2, rank=3)
    truncation = orthonormal_truncation(P, Q, 7)
    torch.testing.assert_close(truncation.T.mT @ truncation.T, torch.eye(7, dtype=torch.float64))
    assert interpolation_residual(P, Q, truncation) < 1e-14
    with pytest.raises(TruncationError, match="above rounding"):
        orthonormal_truncation(P, torch.zeros_like(Q), 3)


def test_all_states_and_sizes_that_do_not_fit() -> None:
    P, Q = gramians(5)
    assert torch.equal(orthonormal_truncation(P, Q, 5).T, torch.eye(5, dtype=torch.float64))
    with pytest.raises(DimensionError, match="r is 6"):
        orthonormal_truncation(P, Q, 6)
    with pytest.raises(DimensionError, match="both must be the same"):
        orthonormal_truncation(P, Q[:4, :4], 2)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, truncation: Truncation | None = None):
    """Outputs and states of a delta rule of one head, step by step; q, k: (length, N), v: (length, d)."""
    read, write, erase = q, k, k
    if truncation is not None:
        read, write, erase = q @ truncation.T, k @ truncation.W, k @ truncation.T
    state, outputs, states = write.new_zeros(write.shape[1], v.shape[1]), [], []
    for t in range(len(v)):
        state = decay[t] * state
        state = state + beta[t] * torch.outer(write[t], v[t] - erase[t] @ state)
        states.append(state)
        outputs.append(read[t] @ state)
    return torch.stack(outputs), torch.stack(states)


def data_of(size: int, dims: int, seed: int, length: int = 300, tail: float = 0.0):
    """A delta rule's arguments whose keys and queries lie in `dims` directions, and as much of the others as `tail`."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    basis = torch.linalg.qr(normal(size, size))[0]
    scale = torch.full((size,), tail, dtype=torch.float64)
    scale[:dims] = 1.0
    turn = torch.linalg.qr(normal(dims, dims))[0]
    k = normal(length, size) * scale
    q = normal(length, size) * scale
    q = torch.cat([q[:, :dims] @ turn, q[:, dims:]], 1)
    q, k = (torch.nn.functional.normalize(x @ basis.T, dim=-1) for x in (q, k))
    return (
        q,
        k,
        normal(length, 3),
        torch.rand(length, generator=generator).double() * 0.2 + 0.8,
        normal(length).sigmoid(),
    )


def measured(q, k, v, decay, beta) -> tuple[Tensor, Tensor]:
    """Both Gramians of the rule under random output gradients, by autograd."""
    q, k, v, decay, beta = (x.clone() for x in (q, k, v, decay, beta))
    state, states, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype, requires_grad=True), [], []
    for t in range(len(v)):
        state = decay[t] * state
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        states.append(state)
        outputs.append(q[t] @ state)
    probe = torch.randn(len(v), v.shape[1], generator=torch.Generator().manual_seed(0)).sign().double()
    adjoints = torch.autograd.grad((torch.stack(outputs) * probe).sum(), states)
    return tuple(sum(x.detach() @ x.detach().mT for x in group) / len(v) for group in (states, adjoints))


@pytest.mark.parametrize("form", ["orthonormal", "oblique"])
def test_directions_that_no_key_reaches_are_cut_exactly(form: str) -> None:
    given = data_of(12, 5, seed=1)
    P, Q = measured(*given)
    keys = given[1] * given[4].sqrt()[:, None]
    truncation = orthonormal_truncation(P, Q, 5) if form == "orthonormal" else oblique_truncation(P, Q, 5, keys)
    full, _ = delta_rule(*given)
    cut, states = delta_rule(*given, truncation)
    assert states.shape[1] == 5
    assert (cut - full).norm() <= 1e-7 * full.norm()


@pytest.mark.parametrize("seed", range(3))
def test_on_data_it_loses_little_and_less_than_other_subspaces(seed: int) -> None:
    """The output of the reduced rule, run through the data: against the keys' eigenvectors and random directions."""
    given = data_of(16, 4, seed, tail=0.15)
    P, Q = measured(*given)
    full, _ = delta_rule(*given)

    def error(U: Tensor) -> float:
        return float((delta_rule(*given, Truncation(T=U, W=U.clone()))[0] - full).norm() / full.norm())

    ours = error(orthonormal_truncation(P, Q, 5).T)
    assert ours < 0.6
    assert ours < 0.7 * min(error(random_basis(16, 5, 50 + i)) for i in range(5))
    assert ours < 1.05 * error(torch.linalg.eigh(given[1].mT @ given[1]).eigenvectors[:, -5:])


def test_a_cut_rule_stays_stable() -> None:
    """Without decay and at full strength a state never grows, for a cut rule as for the full one."""
    q, k, v, decay, beta = data_of(12, 12, seed=2, length=3000)
    decay, beta = torch.ones_like(decay), torch.ones_like(beta) * 1.999
    P, Q = gramians(12, 3)
    free = torch.zeros_like(v)
    free[0] = v[0]
    _, states = delta_rule(q, k, free, decay, beta, orthonormal_truncation(P, Q, 4))
    sizes = states.flatten(1).norm(dim=1)
    assert (sizes.diff() <= 1e-12).all()
