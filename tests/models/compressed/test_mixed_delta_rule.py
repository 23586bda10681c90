"""The mixed form of gated DeltaNet: what it computes, and that nothing grows whatever training does to its matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from hf_compressm import CompreSSMConfig, compress, fast_cpu_scan
from hf_compressm.architectures import find_layers
from hf_compressm.models.compressed.mixed_delta_rule import MixedDeltaRule, bounded
from hf_compressm.models.compressed.stock_families import STOCK_FAMILIES
from hf_compressm.ops import delta_rule_reference
from tests.cases import logits_of, token_batch
from tests.delta_rule_models import GATED_CONFIGS, KEY_HEADS, tiny_gated_delta_net

N, HALF = 8, 4
CALL = STOCK_FAMILIES["qwen3_next"].scans[1]
every_family = pytest.mark.parametrize("family", GATED_CONFIGS)


class Matrices(MixedDeltaRule):
    """The two matrices of a mixed layer and nothing else."""

    def __init__(self, W: Tensor, T: Tensor) -> None:
        self.input_mixing, self.readout_mixing = W, T


def cut(family: str, **settings):
    model = tiny_gated_delta_net(family)
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, **settings)
    assert compress(model, [token_batch()], config, progress=False).outcome == "cut"
    return model.eval()


def orthonormal(heads: int = KEY_HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(heads, N, HALF, dtype=torch.float64, generator=generator)).Q.float()


def rule_arguments(length: int, heads: int = KEY_HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    key, query = torch.randn(2, 2, length, heads, N, generator=generator).unbind(0)
    value = torch.randn(2, length, 4, 6, generator=generator)
    g, beta = -torch.rand(2, length, 4, generator=generator), torch.rand(2, length, 4, generator=generator)
    return {"query": query, "key": key, "value": value, "g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}


@pytest.mark.parametrize("repeated", [1, 2])
def test_it_computes_its_equations(repeated: int) -> None:
    """Against the reference on keys and queries that are normed and combined by hand."""
    W, T = orthonormal(), orthonormal().flip(-1) * 0.7
    given = rule_arguments(9)
    k, q = (x / x.norm(dim=-1, keepdim=True) for x in (given["key"], given["query"]))
    k, q = (torch.stack([x[:, :, h] @ M[h] for h in range(KEY_HEADS)], 2) for x, M in ((k, W), (q, T)))
    expected, _ = delta_rule_reference(q * N**-0.5, k, given["value"], given["g"], given["beta"])
    given = {**given, **{name: given[name].repeat_interleave(repeated, dim=2) for name in ("key", "query")}}
    mixed = Matrices(W, T).combined(CALL, given)
    assert mixed["use_qk_l2norm_in_kernel"] is False
    # Earlier versions of transformers want one a value head.
    heads = {name: mixed[name].repeat_interleave(4 // mixed[name].shape[2], dim=2) for name in ("key", "query")}
    found, _ = torch_recurrent_gated_delta_rule(**{**mixed, **heads})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_the_matrices_are_orthonormal_at_the_cut_and_trained(family: str) -> None:
    model = cut(family, fit_readout=False).train()
    model(**token_batch(), use_cache=False).loss.backward()
    for layer in find_layers(model):
        W, T = layer.module.input_mixing, layer.module.readout_mixing
        assert W.shape == T.shape == (KEY_HEADS, N, HALF) and torch.equal(W, T)
        torch.testing.assert_close(W.mT @ W, torch.eye(HALF).expand(KEY_HEADS, -1, -1), rtol=1e-5, atol=1e-6)
        assert W.grad.abs().max() > 0 and T.grad.abs().max() > 0


@every_family
@pytest.mark.parametrize("reductor", ["interpolative", "selection"])
def test_other_reductors_with_an_orthonormal_w(family: str, reductor: str) -> None:
    model = cut(family, reductor=reductor)
    assert [layer.state_size for layer in find_layers(model)] == [HALF, HALF]
    assert logits_of(model, token_batch()).isfinite().all()


def test_a_bounded_key_is_itself_where_it_is_short_and_of_length_one_where_it_is_long() -> None:
    keys = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = bounded(keys, torch.float32)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0]]))
    found.sum().backward()
    assert keys.grad.isfinite().all() and torch.equal(keys.grad[2], torch.ones(2))
    long = 100 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert float(bounded(long, dtype).to(dtype).double().norm(dim=-1).max()) <= 1 + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_nothing_grows_in_sixteen_thousand_steps(dtype: torch.dtype, scale: float) -> None:
    """
    Without decay and with beta at two, its largest: what a state holds at first is never more afterwards.

    A matrix that training has made thirty times as large would, unbounded, let it grow by a factor a step.
    """
    steps = 16_000
    W = scale * orthonormal()
    generator = torch.Generator().manual_seed(2)
    key = torch.randn(1, steps, KEY_HEADS, N, generator=generator).to(dtype)
    mixed = Matrices(W, W).combined(CALL, {"key": key, "query": key, "use_qk_l2norm_in_kernel": True})
    zeros, beta = torch.zeros(1, steps, KEY_HEADS), torch.full((1, steps, KEY_HEADS), 2.0)
    start = torch.randn(1, KEY_HEADS, HALF, 3, generator=generator)
    value = torch.zeros(1, steps, KEY_HEADS, 3)
    output, state = delta_rule_reference(mixed["query"].float(), mixed["key"].float(), value, zeros, beta, start)
    # Rounding of single precision in that many steps.
    assert float(state.norm()) <= float(start.norm()) * 1.01
    assert output.isfinite().all()


def test_a_layer_with_moved_matrices_stays_bounded() -> None:
    """The whole layer of Olmo Hybrid, beta up to two, over a long sequence, with matrices that are no longer short."""
    model = cut("olmo_hybrid")
    layer = find_layers(model)[0].module
    with torch.no_grad():
        layer.input_mixing.mul_(50)
        layer.A_log.fill_(-20)  # next to no decay
        seen = []
        layer.o_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with fast_cpu_scan():
            layer(torch.randn(1, 16_000, 16, generator=torch.Generator().manual_seed(0)))
    first, last = (
        seen[0].unflatten(0, (16_000, -1)).norm(dim=-1)[:2000],
        seen[0].unflatten(0, (16_000, -1)).norm(dim=-1),
    )
    assert last.isfinite().all() and float(last[-2000:].mean()) < 4 * float(first.mean())
