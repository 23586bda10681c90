"""Gramians of the multi-head recurrence against a plain loop over time, and their adjoint states against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import multi_head_adjoint_gramian, multi_head_gramians, multi_head_state_gramian, sample_times

# batch, length, heads, head_dim, groups, N
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 2, 3, 4), (3, 67, 4, 5, 2, 8), (2, 130, 6, 3, 1, 16)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6}


def arguments_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a multi-head scan; decays from almost 1 to almost 0."""
    batch, length, heads, head_dim, groups, n_states = shape
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    arguments = {
        "u": normal(batch, length, heads, head_dim),
        "delta": normal(batch, length, heads).sub(1).exp(),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, n_states),
        "C": normal(batch, length, groups, n_states),
    }
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


def states_and_adjoints(arguments: dict[str, Tensor], grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """All states (batch, length, heads, head_dim, N), and by autograd the gradient of `sum(y * grad_y)` in each."""
    u, delta, A, B, C = (tensor.double() for tensor in arguments.values())
    B, C = (tensor.repeat_interleave(u.shape[2] // B.shape[2], dim=2) for tensor in (B, C))
    state = u.new_zeros(*u[:, 0].shape, B.shape[-1]).requires_grad_()
    states, outputs = [], []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        state = decay * state + (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        states.append(state)
        outputs.append((state * C[:, t, :, None]).sum(-1))
    adjoints = torch.autograd.grad((torch.stack(outputs, 1) * grad_y.double()).sum(), states)
    return torch.stack(states, 1).detach(), torch.stack(adjoints, 1)


def outer_products(vectors: Tensor, times: Tensor, groups: int) -> Tensor:
    """Scaled sum over sampled steps of each group, straight from the definition: (groups, N, N)."""
    sampled = torch.cat([sequence[steps] for sequence, steps in zip(vectors, times)])
    rows = [heads.reshape(-1, vectors.shape[-1]) for heads in sampled.chunk(groups, dim=1)]
    return vectors.shape[1] / times.shape[1] * torch.stack([part.T @ part for part in rows])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sampled", [False, True], ids=["all-steps", "sampled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gramians_match_loop_and_autograd(shape, sampled, dtype) -> None:
    batch, length, heads, head_dim, groups, _ = shape
    arguments = arguments_of(shape, dtype)
    grad_y = torch.randn(batch, length, heads, head_dim).to(dtype)
    states, adjoints = states_and_adjoints(arguments, grad_y)
    times = sample_times(batch, length, max(1, length // 3), torch.Generator().manual_seed(3)) if sampled else None
    steps = torch.arange(length).expand(batch, length) if times is None else times

    P, readout_energy = multi_head_state_gramian(**arguments, times=times)
    Q = multi_head_adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], grad_y, times)
    assert_close(P, outer_products(states, steps, groups), TOLERANCES[dtype])
    assert_close(Q, outer_products(adjoints, steps, groups), TOLERANCES[dtype])
    C = arguments["C"].double().repeat_interleave(heads // groups, dim=2)
    read = outer_products(states * C[:, :, :, None], steps, groups)
    assert_close(readout_energy, read.diagonal(dim1=1, dim2=2), TOLERANCES[dtype])


def test_the_size_of_chunks_changes_nothing(monkeypatch) -> None:
    arguments = arguments_of((3, 70, 4, 5, 2, 6))
    times = sample_times(3, 70, 17, torch.Generator().manual_seed(0))
    whole = multi_head_state_gramian(**arguments, times=times)
    for elements in (1, 4 * 5 * 6 * 7):
        monkeypatch.setattr(multi_head_gramians, "_CHUNK_ELEMENTS", elements)
        parts = multi_head_state_gramian(**arguments, times=times)
        for one, other in zip(whole, parts):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("times", [[[0, 0, 1, 49]], [[47, 48, 49]], [[3] * 50]], ids=str)
def test_samples_may_lie_anywhere(times: list[list[int]]) -> None:
    """Steps far apart are reached by stops in between, which enter no sum; a step drawn twice counts twice."""
    arguments, steps = arguments_of((1, 50, 2, 3, 1, 4)), torch.tensor(times)
    states, _ = states_and_adjoints(arguments, torch.ones(1, 50, 2, 3))
    P, _ = multi_head_state_gramian(**arguments, times=steps)
    assert_close(P, outer_products(states, steps, 1), 1e-12)


def test_decays_keep_their_digits_in_a_long_sequence() -> None:
    """A running sum of logarithms over all steps would lose them in float32."""
    arguments = arguments_of((1, 4000, 1, 2, 1, 3), torch.float32)
    arguments["delta"] = arguments["delta"] * 5
    times = sample_times(1, 4000, 500, torch.Generator().manual_seed(0))
    exact, _ = multi_head_state_gramian(**{name: t.double() for name, t in arguments.items()}, times=times)
    found, _ = multi_head_state_gramian(**arguments, times=times)
    assert_close(found, exact, 1e-5)


def test_a_surrounding_autocast_is_not_followed() -> None:
    arguments = arguments_of((2, 40, 2, 3, 1, 4), torch.float32)
    times = sample_times(2, 40, 9, torch.Generator().manual_seed(0))
    expected, _ = multi_head_state_gramian(**arguments, times=times)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = multi_head_state_gramian(**arguments, times=times)
    assert torch.equal(found, expected)


def test_no_sequence_gives_no_state() -> None:
    arguments = arguments_of((0, 5, 4, 3, 2, 6))
    P, readout_energy = multi_head_state_gramian(**arguments)
    Q = multi_head_adjoint_gramian(arguments["delta"], arguments["A"], arguments["C"], arguments["u"])
    assert P.shape == Q.shape == (2, 6, 6) and readout_energy.shape == (2, 6)
    assert not P.any() and not Q.any() and not readout_energy.any()


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = arguments_of((2, 5, 4, 3, 2, 4))
    with pytest.raises(DimensionError, match="4 heads; 3 groups"):
        multi_head_state_gramian(
            **{**arguments, "B": torch.zeros(2, 5, 3, 4).double(), "C": torch.zeros(2, 5, 3, 4).double()}
        )
    with pytest.raises(DimensionError, match="`delta` has shape"):
        multi_head_state_gramian(**{**arguments, "delta": torch.zeros(2, 5, 3).double()})
    with pytest.raises(DimensionError, match="ascending"):
        multi_head_state_gramian(**arguments, times=torch.tensor([[1, 0], [0, 1]]))
    with pytest.raises(ConfigurationError, match="dtype"):
        multi_head_adjoint_gramian(
            arguments["delta"], arguments["A"], arguments["C"], torch.zeros(2, 5, 4, 3, dtype=torch.int64)
        )
