"""The mixed form of Kimi delta attention: what it computes, and that nothing grows whatever training does to W."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as stock

from hf_compressm.models.compressed.mixed_kimi_delta import MixedKimiDelta, mean_decay
from hf_compressm.models.compressed.stock_families import STOCK_FAMILIES
from hf_compressm.ops import delta_rule_reference

HEADS, N, HALF, VALUE_DIM = 2, 8, 4, 6
CHUNK, STEP = STOCK_FAMILIES["kimi_linear"].scans


class Matrices(MixedKimiDelta):
    """The two matrices of a mixed layer and nothing else."""

    def __init__(self, W: Tensor, T: Tensor) -> None:
        self.input_mixing, self.readout_mixing = W, T


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_columns() -> tuple[Tensor, Tensor]:
    """Kept channels of two heads, and the columns of the identity that pick them."""
    kept = torch.tensor([[0, 2, 3, 7], [1, 4, 5, 6]])
    return kept, torch.nn.functional.one_hot(kept, N).mT.float()


def arguments(length: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    query, key, g = random(3, 2, length, HEADS, N, seed=1).unbind(0)
    value, beta = random(2, length, HEADS, VALUE_DIM, seed=2), random(2, length, HEADS, seed=3).sigmoid()
    given = {"query": query, "key": key, "value": value, "g": -g.abs(), "beta": beta}
    return {**{name: x.to(dtype) for name, x in given.items()}, "use_qk_l2norm_in_kernel": True}


def by_hand(given: dict[str, Tensor], W: Tensor, T: Tensor) -> Tensor:
    """The equations of the form, head by head, in the reference of the rule."""
    k, q = (x / x.norm(dim=-1, keepdim=True) for x in (given["key"], given["query"]))
    k, q = (torch.stack([x[:, :, h] @ M[h] for h in range(HEADS)], 2) for x, M in ((k, W), (q, T)))
    k = k / k.norm(dim=-1, keepdim=True).clamp_min(1)
    shares = W.square() / W.square().sum(1, keepdim=True)
    g = torch.stack([given["g"][:, :, h].exp() @ shares[h] for h in range(HEADS)], 2).log()
    return delta_rule_reference(q * N**-0.5, k, given["value"], g, given["beta"])[0]


@pytest.mark.parametrize("call", [CHUNK, STEP], ids=lambda call: call.name)
@pytest.mark.parametrize("trained", [False, True])
def test_it_computes_its_equations_in_the_stock_rules(call, trained: bool) -> None:
    """With kept channels as at the cut, and with a W that training has filled and made longer."""
    W, T = (random(HEADS, N, HALF, seed=5) if trained else kept_columns()[1]), random(HEADS, N, HALF, seed=4)
    given = {**arguments(), "initial_state": None, "output_final_state": False}
    mixed = Matrices(W, T).combined(call, given)
    assert mixed["use_qk_l2norm_in_kernel"] is False
    found, _ = getattr(stock, call.name)(**mixed)
    torch.testing.assert_close(found, by_hand(given, W, T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 60.0])
def test_kept_channels_keep_their_decays(scale: float) -> None:
    kept, W = kept_columns()
    g = scale * arguments()["g"]
    picked = torch.stack([g[:, :, head, states] for head, states in enumerate(kept)], 2)
    # Below that float32 has no decay left.
    found, picked = (x.clamp_min(-87.0) for x in (mean_decay(g, W), picked))
    torch.testing.assert_close(found, picked, rtol=2e-6, atol=0)
    # The length of a column, which weight decay makes smaller, does not matter.
    torch.testing.assert_close(mean_decay(g, 0.1 * W), mean_decay(g, W))


def test_a_channel_that_forgets_everything_costs_a_column_no_more_than_its_share() -> None:
    """A mean of logarithms would be dragged along, and training pushes such decays until stock code overflows."""
    g = torch.zeros(1, 1, 1, 2)
    g[..., 1] = -1000.0
    W = torch.tensor([[[0.99**0.5], [0.01**0.5]]])
    found = mean_decay(g.requires_grad_(), W)
    assert found.item() == pytest.approx(math.log(0.99))
    found.sum().backward()
    assert g.grad[..., 1].item() == 0.0 and g.grad.isfinite().all()


def test_a_column_of_channels_that_forget_everything_is_finite_forward_and_backward() -> None:
    g = torch.full((1, 1, 1, 2), -1e4, requires_grad=True)
    W = torch.ones(1, 2, 1, requires_grad=True)
    found = mean_decay(g, W)
    assert -88 < found.item() < -87
    found.sum().backward()
    assert g.grad.isfinite().all() and W.grad.isfinite().all()


def test_gradients_of_mean_decays_are_those_of_finite_differences() -> None:
    g = (-3 * torch.rand(1, 3, HEADS, N, dtype=torch.float64)).requires_grad_()
    W = random(HEADS, N, HALF, seed=5).double().requires_grad_()
    assert bool((mean_decay(g, W) < math.log(0.5)).any()) and bool((mean_decay(0.1 * g, W) > math.log(0.5)).all())
    assert torch.autograd.gradcheck(mean_decay, (g, W))
    assert torch.autograd.gradcheck(lambda g, W: mean_decay(0.1 * g, W), (g, W))


def test_a_mean_of_decays_lies_between_them_and_has_gradients_everywhere() -> None:
    g = arguments()["g"]
    W = random(HEADS, N, HALF, seed=5).requires_grad_()
    mean = mean_decay(g, W)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    assert bool(((mean >= low) & (mean <= high)).all()) and float(mean.detach().max()) <= 0
    mean.sum().backward()
    assert bool((W.grad != 0).all())
    # A channel that nothing writes to.
    empty = torch.zeros(HEADS, N, HALF, requires_grad=True)
    mean = mean_decay(g, empty)
    assert bool((mean == 0).all())
    mean.sum().backward()
    assert empty.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_keep_their_dtype(dtype: torch.dtype) -> None:
    given = arguments(dtype=dtype)
    W = kept_columns()[1].to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            mixed = Matrices(W, W).combined(CHUNK, given)
        assert {mixed[name].dtype for name in ("query", "key", "g")} == {dtype}
        assert mixed["g"].shape == mixed["key"].shape == mixed["query"].shape == (2, 9, HEADS, HALF)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_nothing_grows_in_sixteen_thousand_steps(dtype: torch.dtype, scale: float) -> None:
    """
    With next to no decay and beta at one, its largest: what a state holds at first is never more afterwards.

    Unbounded, a W that training has filled and made thirty times as long would let it grow by a factor a step.
    """
    steps = 16_000
    W = scale * random(HEADS, N, HALF, seed=6)
    key = random(1, steps, HEADS, N, seed=7).to(dtype)
    g = -1e-6 * random(1, steps, HEADS, N, seed=8).abs().to(dtype)
    given = {"key": key, "query": key, "g": g, "use_qk_l2norm_in_kernel": True}
    mixed = Matrices(W, W).combined(CHUNK, given)
    start, value = random(1, HEADS, HALF, 3, seed=9), torch.zeros(1, steps, HEADS, 3)
    arrays = [mixed[name].float() for name in ("query", "key")]
    output, state = delta_rule_reference(*arrays, value, mixed["g"].float(), torch.ones(1, steps, HEADS), start)
    assert float(state.norm()) <= float(start.norm()) * 1.01
    assert output.isfinite().all()
