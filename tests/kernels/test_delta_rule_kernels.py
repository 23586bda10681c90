"""fla's chunk and step kernels of gated DeltaNet and Kimi delta attention compute the rule of `ops/delta_rule.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.ops import delta_rule_reference

# Neither size is a power of two, keys and values differ in it and in the number of heads, and the length does not fill
# fla's chunks of 64.
KEY_DIM, VALUE_DIM, KEY_HEADS, HEADS, LENGTH = 24, 40, 1, 2, 70


def arguments(per_entry: bool) -> list[Tensor]:
    """Queries, keys of lengths below one, as a cut leaves them, values, decays, beta and a state to start from."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, LENGTH, KEY_HEADS, KEY_DIM, generator=generator) for _ in range(2))
    lengths = torch.rand(2, LENGTH, KEY_HEADS, 1, generator=generator)
    value = torch.randn(2, LENGTH, HEADS, VALUE_DIM, generator=generator)
    entries = (KEY_DIM,) if per_entry else ()
    log_decay = -0.3 * torch.rand(2, LENGTH, HEADS, *entries, generator=generator)
    beta = torch.rand(2, LENGTH, HEADS, generator=generator)
    state = torch.randn(2, HEADS, KEY_DIM, VALUE_DIM, generator=generator)
    key = lengths * key / key.norm(dim=-1, keepdim=True)
    return [tensor.requires_grad_() for tensor in (query, key, value, log_decay, beta, state)]


def reference(query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    # The kernels scale queries themselves.
    return delta_rule_reference(query * KEY_DIM**-0.5, *others)


def kernels(per_entry: bool) -> tuple:
    """The chunked and the step-by-step one."""
    if per_entry:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda

        return chunk_kda, fused_recurrent_kda
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


def run(kernel, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    *inputs, g, beta, state = inputs
    return kernel(*inputs, g=g, beta=beta, initial_state=state, output_final_state=True)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all() and (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("per_entry", [False, True], ids=["gated_delta_net", "kimi"])
def test_chunks(per_entry: bool) -> None:
    inputs = arguments(per_entry)
    found, expected = run(kernels(per_entry)[0], inputs), reference(*inputs)
    close(found, expected)
    weights = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected)]
    close(*gradients)


@pytest.mark.parametrize("per_entry", [False, True], ids=["gated_delta_net", "kimi"])
def test_single_steps(per_entry: bool) -> None:
    """fla has no backward pass of these."""
    inputs = [x.detach() for x in arguments(per_entry)]
    expected, last = reference(*inputs)
    state, outputs = inputs[-1], []
    for t in range(3):
        output, state = run(kernels(per_entry)[1], [*(x[:, t : t + 1] for x in inputs[:-1]), state])
        outputs.append(output)
    close((torch.cat(outputs, 1),), (expected[:, :3],))
    close(run(kernels(per_entry)[1], inputs), (expected, last))
