"""Gramians of the delta rule against a plain loop over time, and their adjoint states against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, softplus

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import _delta_rule_stretches, delta_rule_adjoint_gramian, delta_rule_state_gramian, sample_times

# batch, length, key heads, heads, N, head_dim
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 1, 3, 4, 2), (3, 67, 2, 4, 8, 5), (2, 40, 3, 3, 16, 3)]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5}


def arguments_of(
    shape: tuple[int, ...],
    per_entry: bool = False,
    erases: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    strength: float = 1.0,
) -> dict[str, Tensor]:
    """Arguments of a delta rule, norms as in the layers; decays from almost 1 to almost 0."""
    batch, length, key_heads, heads, n_states, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    decays = (batch, length, heads, n_states) if per_entry else (batch, length, heads)
    arguments = {
        "query": normalize(normal(batch, length, key_heads, n_states), dim=-1),
        "key": normalize(normal(batch, length, key_heads, n_states), dim=-1),
        "value": normal(batch, length, heads, head_dim),
        "log_decay": -strength * softplus(normal(*decays) * 2 - 1),
        "beta": normal(batch, length, heads).sigmoid(),
    }
    if erases:
        arguments["erase"] = normalize(normal(batch, length, key_heads, n_states), dim=-1)
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


def states_and_adjoints(arguments: dict[str, Tensor], grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """
    All states, (batch, length, heads, N, head_dim), and by autograd the gradient of `sum(o * grad_output)` in each.

    Written from the definition, head by head and step by step, with the transition as a matrix.
    """
    query, key, value, log_decay, beta = (arguments[n].double() for n in ("query", "key", "value", "log_decay", "beta"))
    erase = arguments.get("erase", arguments["key"]).double()
    batch, length, heads, head_dim = value.shape
    n_states, shared = key.shape[3], heads // key.shape[2]
    states, outputs = [], []
    state = value.new_zeros(batch, heads, n_states, head_dim).requires_grad_()
    for t in range(length):
        now = []
        for h in range(heads):
            k, e, b = key[:, t, h // shared], erase[:, t, h // shared], beta[:, t, h, None, None]
            decay = log_decay[:, t, h].exp()
            decay = torch.diag_embed(decay if decay.ndim == 2 else decay[:, None].expand(-1, n_states))
            transition = (torch.eye(n_states, dtype=torch.float64) - b * k[:, :, None] * e[:, None]) @ decay
            now.append(transition @ state[:, h] + b * k[:, :, None] * value[:, t, h, None])
        state = torch.stack(now, 1)
        states.append(state)
        read = query[:, t].repeat_interleave(shared, dim=1)
        outputs.append((state * read[..., None]).sum(2))
    adjoints = torch.autograd.grad((torch.stack(outputs, 1) * grad_output.double()).sum(), states)
    return torch.stack(states, 1).detach(), torch.stack(adjoints, 1)


def outer_products(matrices: Tensor, times: Tensor, key_heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled sum over sampled steps, columns and the heads of a key head, from the definition: (key heads, N, N)."""
    total = 0
    for b, steps in enumerate(times.tolist()):
        for t in steps:
            if mask is None or mask[b, t]:
                total = total + (matrices[b, t] @ matrices[b, t].mT).unflatten(0, (key_heads, -1)).sum(1)
    return matrices.shape[1] / times.shape[1] * total


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def both(arguments: dict[str, Tensor], grad_output: Tensor, **options: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    P, energy = delta_rule_state_gramian(**arguments, **options)
    others = {name: tensor for name, tensor in arguments.items() if name != "value"}
    return P, energy, delta_rule_adjoint_gramian(**others, grad_output=grad_output, **options)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("erases", [False, True], ids=["key-erases", "own-erase"])
@pytest.mark.parametrize("per_entry", [False, True], ids=["decay-a-head", "decay-an-entry"])
@pytest.mark.parametrize("sampled", [False, True], ids=["all-steps", "sampled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gramians_match_loop_and_autograd(shape, sampled, per_entry, erases, dtype) -> None:
    batch, length, key_heads, heads, _, head_dim = shape
    arguments = arguments_of(shape, per_entry, erases, dtype)
    grad_output = torch.randn(batch, length, heads, head_dim).to(dtype)
    states, adjoints = states_and_adjoints(arguments, grad_output)
    times = sample_times(batch, length, max(1, length // 6), torch.Generator().manual_seed(3)) if sampled else None
    steps = torch.arange(length).expand(batch, length) if times is None else times
    P, energy, Q = both(arguments, grad_output, times=times)
    assert_close(P, outer_products(states, steps, key_heads), TOLERANCES[dtype])
    assert_close(Q, outer_products(adjoints, steps, key_heads), TOLERANCES[dtype])
    read = arguments["query"].double().repeat_interleave(heads // key_heads, dim=2)
    expected = outer_products(states * read[..., None], steps, key_heads).diagonal(dim1=1, dim2=2)
    assert_close(energy, expected, TOLERANCES[dtype])


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_shape_any_samples_any_padding(data: st.DataObject) -> None:
    """Samples anywhere, twice or far apart; padding in front, in the middle or behind."""
    number = lambda last: data.draw(st.integers(1, last))  # noqa: E731
    batch, length, key_heads, shared = number(3), number(40), number(2), number(2)
    shape = (batch, length, key_heads, key_heads * shared, number(9), number(4))
    arguments = arguments_of(
        shape, data.draw(st.booleans()), data.draw(st.booleans()), seed=number(10**6),
        strength=data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])),
    )  # fmt: skip
    count = number(length)
    drawn = st.lists(st.integers(0, length - 1), min_size=count, max_size=count).map(sorted)
    times = torch.tensor([data.draw(drawn) for _ in range(batch)])
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(rows) for _ in range(batch)]) if data.draw(st.booleans()) else None
    grad_output = torch.randn(batch, length, shape[3], shape[5], dtype=torch.float64)
    states, adjoints = states_and_adjoints(arguments, grad_output)
    P, _, Q = both(arguments, grad_output, times=times, mask=mask)
    for found, matrices in ((P, states), (Q, adjoints)):
        expected = outer_products(matrices, times, key_heads, mask)
        scale = matrices.square().sum() + 1e-30
        assert (found - expected).abs().max() <= 1e-10 * length * scale
        assert torch.linalg.eigvalsh(found).min() >= -1e-10 * length * scale


def test_the_size_of_chunks_changes_nothing(monkeypatch) -> None:
    arguments, grad_output = arguments_of((3, 70, 2, 4, 6, 5), per_entry=True), torch.randn(3, 70, 4, 5).double()
    times = sample_times(3, 70, 17, torch.Generator().manual_seed(0))
    whole = both(arguments, grad_output, times=times)
    for elements in (1, 4 * 6 * 5 * 2, 40 * 4 * 6 * 5):
        monkeypatch.setattr(_delta_rule_stretches, "CHUNK_ELEMENTS", elements)
        for one, other in zip(whole, both(arguments, grad_output, times=times)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_samples_far_apart_take_no_more_memory_than_others(monkeypatch) -> None:
    """Stops in between keep the stretches, which are filled up to one length, short."""
    widths = []
    between = _delta_rule_stretches._Stretch.between.__func__

    def note(cls, begins, ends, width, rule):
        widths.append(width)
        return between(cls, begins, ends, width, rule)

    monkeypatch.setattr(_delta_rule_stretches._Stretch, "between", classmethod(note))
    times = torch.tensor([[*range(10), 399]])
    both(arguments_of((1, 400, 1, 1, 4, 2)), torch.ones(1, 400, 1, 2).double(), times=times)
    assert len(widths) == 2 and max(widths) <= 2 * 37


@pytest.mark.parametrize("per_entry", [False, True])
def test_strong_decays_overflow_nowhere(per_entry: bool) -> None:
    """A ratio of two decays overflows in float32 where their difference of logarithms is some hundred."""
    arguments = arguments_of((1, 64, 1, 1, 4, 3), per_entry, dtype=torch.float32, strength=300.0)
    grad_output = torch.randn(1, 64, 1, 3)
    times = sample_times(1, 64, 4, torch.Generator().manual_seed(0))
    states, adjoints = states_and_adjoints(arguments, grad_output)
    P, _, Q = both(arguments, grad_output, times=times)
    assert_close(P, outer_products(states, times, 1), 1e-4)
    assert_close(Q, outer_products(adjoints, times, 1), 1e-4)


def test_a_surrounding_autocast_is_not_followed() -> None:
    arguments, grad_output = arguments_of((2, 40, 1, 2, 4, 3), dtype=torch.float32), torch.randn(2, 40, 2, 3)
    expected = both(arguments, grad_output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(arguments, grad_output)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = arguments_of((2, 5, 2, 4, 3, 2))
    with pytest.raises(DimensionError, match="4 heads; 3 key heads"):
        three = torch.zeros(2, 5, 3, 3).double()
        delta_rule_state_gramian(**{**arguments, "query": three, "key": three})
    with pytest.raises(DimensionError, match="`log_decay` has shape"):
        delta_rule_state_gramian(**{**arguments, "log_decay": torch.zeros(2, 5, 3).double()})
    with pytest.raises(DimensionError, match="`mask` has"):
        delta_rule_state_gramian(**arguments, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(DimensionError, match="ascending"):
        delta_rule_state_gramian(**arguments, times=torch.tensor([[1, 0], [0, 1]]))
    arguments.pop("value")
    with pytest.raises(ConfigurationError, match="dtype"):
        delta_rule_adjoint_gramian(**arguments, grad_output=torch.zeros(2, 5, 4, 2, dtype=torch.int64))
