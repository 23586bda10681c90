"""Gramians of the mLSTM against a plain loop over time, and their adjoint states against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.errors import ConfigurationError, DimensionError
from hf_compressm.ops import mlstm_adjoint_gramian, mlstm_state_gramian, sample_times
from hf_compressm.ops.mlstm_gramians import stabilised_gates
from tests.ops.test_multi_head_gramians import assert_close, outer_products

# batch, length, heads, head_dim, N
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 2, 4), (2, 150, 2, 5, 8)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-4}
EPS = 1e-3


def arguments_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gates that are open and shut, so that the normaliser is now above and now below its floor."""
    batch, length, heads, head_dim, N = shape
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    arguments = {
        "v": normal(batch, length, heads, head_dim),
        "i": 2 * normal(batch, length, heads),
        "f": 3 * normal(batch, length, heads) + 2,
        "k": normal(batch, length, heads, N),
        "q": N**-0.5 * normal(batch, length, heads, N),
    }
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


def loop(arguments: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The outputs, the states (batch, heads, columns, N) as leaves of the loop's graph, and where n is read."""
    v, i, f, k, q = (tensor.double() for tensor in arguments.values())
    batch, length, heads, head_dim = v.shape
    m = v.new_zeros(batch, heads)
    state = v.new_zeros(batch, heads, head_dim + 1, k.shape[-1]).requires_grad_()
    outputs, states, above = [], [], []
    for t in range(length):
        forget = torch.nn.functional.logsigmoid(f[:, t])
        m, before = torch.maximum(forget + m, i[:, t]), m
        written = torch.cat([v[:, t], torch.ones_like(v[:, t, :, :1])], -1)[..., None] * k[:, t, :, None]
        state = (forget + before - m).exp()[..., None, None] * state + (i[:, t] - m).exp()[..., None, None] * written
        states.append(state)
        read = (state * q[:, t, :, None]).sum(-1)
        above.append(read[..., -1].abs() > torch.exp(-m))
        outputs.append(read[..., :-1] / (torch.maximum(read[..., -1].abs(), torch.exp(-m)) + EPS)[..., None])
    return torch.stack(outputs, 1), states, torch.stack(above)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sampled", [False, True], ids=["all-steps", "sampled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gramians_match_loop_and_autograd(shape, sampled: bool, dtype: torch.dtype) -> None:
    batch, length, heads, head_dim, _ = shape
    arguments = arguments_of(shape, dtype)
    outputs, states, above = loop(arguments)
    assert length == 1 or (above.any() and not above.all()), "both cases of the maximum are there"
    grad_h = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).double()
    adjoints = torch.autograd.grad((outputs * grad_h).sum(), states)
    times = sample_times(batch, length, max(1, length // 3), torch.Generator().manual_seed(3)) if sampled else None
    steps = torch.arange(length).expand(batch, length) if times is None else times

    P, readout_energy = mlstm_state_gramian(**arguments, times=times)
    gates_keys_queries = [arguments[name] for name in ("i", "f", "k", "q")]
    Q = mlstm_adjoint_gramian(*gates_keys_queries, outputs.detach(), grad_h, EPS, times)
    assert_close(P, outer_products(torch.stack(states, 1).detach(), steps, heads), TOLERANCES[dtype])
    assert_close(Q, outer_products(torch.stack(adjoints, 1), steps, heads), TOLERANCES[dtype])
    read = (torch.stack(states, 1) * arguments["q"].double()[:, :, :, None]).detach()
    assert_close(readout_energy, outer_products(read, steps, heads).diagonal(dim1=1, dim2=2), TOLERANCES[dtype])


def test_gates_keep_their_digits_in_a_long_sequence() -> None:
    """A decay is the difference of two sums over all steps before; it is never above one."""
    generator = torch.Generator().manual_seed(0)
    i, f = 5 * torch.randn(2, 1, 20_000, 2, generator=generator)
    m, log_decay, weight = stabilised_gates(i, f)
    assert float(log_decay.max()) <= 0 and float(weight.max()) <= 1
    stepped = torch.zeros(1, 2, dtype=torch.float64)
    for t in range(20_000):
        stepped = torch.maximum(torch.nn.functional.logsigmoid(f[:, t].double()) + stepped, i[:, t].double())
    torch.testing.assert_close(m[:, -1], stepped, rtol=1e-9, atol=1e-9)


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = arguments_of((2, 5, 3, 2, 4))
    with pytest.raises(DimensionError, match="`i` has shape"):
        mlstm_state_gramian(**{**arguments, "i": torch.zeros(2, 5, 2).double()})
    with pytest.raises(DimensionError, match="ascending"):
        mlstm_state_gramian(**arguments, times=torch.tensor([[1, 0], [0, 1]]))
    i, f, k, q, v = (arguments[name] for name in ("i", "f", "k", "q", "v"))
    with pytest.raises(DimensionError, match="`grad_h` has shape"):
        mlstm_adjoint_gramian(i, f, k, q, v, v[..., :1])
    with pytest.raises(ConfigurationError, match="dtype"):
        mlstm_adjoint_gramian(i, f, k, q, v, torch.zeros(v.shape, dtype=torch.int64))
