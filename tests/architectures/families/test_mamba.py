"""The Mamba layer: what a cut does to the function, the gradients, the sizes and the checkpoint."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_compressm.architectures import config_changes, find_layers
from hf_compressm.compression import ModelChange
from hf_compressm.errors import DimensionError, TruncationError
from hf_compressm.systems import Truncation
from tests.cases import CASES, case_id, logits_of, tiny_mamba, token_batch

MAMBA_CASES = [case for case in CASES if case.family == "mamba"]


def cut_all(model: nn.Module, truncations: list[Truncation]) -> ModelChange:
    layers = find_layers(model)
    reductions = [layer.reduce(truncation) for layer, truncation in zip(layers, truncations)]
    sizes = {reduction.layer.name: reduction.state_size for reduction in reductions}
    change = ModelChange(model, reductions, config_changes(layers, sizes))
    change.commit()
    return change


def make_redundant(model: nn.Module, kept: int) -> list[Truncation]:
    """Let the states beyond the first `kept` be combinations of the first ones, and return the exact truncations."""
    truncations = []
    for layer in find_layers(model):
        mixer, n, rank = layer.module, layer.state_size, layer.time_step_rank
        twin = torch.arange(kept, n) % kept
        weights = torch.empty(n - kept).uniform_(-1.5, 1.5)
        with torch.no_grad():
            # The same dynamics and a multiple of the input matrix give a multiple of the state.
            mixer.A_log[:, kept:] = mixer.A_log[:, twin]
            W_B = mixer.x_proj.weight[rank : rank + n]
            W_B[kept:] = weights[:, None] * W_B[twin]
        T = torch.zeros(n, kept, dtype=torch.float64)
        T[:kept] = torch.eye(kept)
        T[range(kept, n), twin] = weights.double()
        truncations.append(Truncation.from_indices(torch.arange(kept), n, T=T, shares=(T.mT != 0).double()))
    return truncations


@pytest.mark.parametrize("case", MAMBA_CASES, ids=case_id)
def test_cutting_redundant_states_changes_nothing(case) -> None:
    model, batch = case.build(), case.batch()
    truncations = make_redundant(model, 3)
    before = logits_of(model, batch)
    cut_all(model, truncations)
    assert [layer.state_size for layer in find_layers(model)] == [3, 3]
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MAMBA_CASES, ids=case_id)
def test_a_cut_to_full_size_changes_nothing(case) -> None:
    model, batch = case.build(), case.batch()
    before = logits_of(model, batch)
    cut_all(model, [Truncation.from_indices(torch.arange(8), 8)] * 2)
    assert torch.equal(logits_of(model, batch), before)


def test_gradients_after_the_cut_are_those_that_the_moment_map_predicts() -> None:
    """With states that are multiples of kept ones the maps are exact for W_B, W_C and A_log alike."""
    model, batch = tiny_mamba(), token_batch()
    truncations = make_redundant(model, 3)
    model.train()
    model(**batch).loss.backward()
    old = {id(p): p.grad.clone() for layer in find_layers(model) for p in layer.state_parameters().values()}
    change = cut_all(model, truncations)
    model(**batch).loss.backward()
    for parameter in change.parameters:
        predicted = parameter.moment_map.first(old[id(parameter.old)])
        actual = parameter.new.grad
        torch.testing.assert_close(predicted, actual, rtol=1e-3, atol=1e-6)


def test_sizes_config_and_attributes_follow() -> None:
    model = tiny_mamba()
    mixer = model.backbone.layers[0].mixer
    mixer.A_log._no_weight_decay = True
    mixer.x_proj.weight.requires_grad_(False)
    cut_all(model, [Truncation.from_indices(torch.tensor([1, 4, 6]), 8)] * 2)
    assert mixer.A_log.shape == (32, 3) and mixer.x_proj.weight.shape == (3 + 6, 32)
    assert mixer.ssm_state_size == 3 and mixer.x_proj.out_features == 9
    assert model.config.state_size == 3 and type(model.config.state_size) is int
    assert mixer.A_log._no_weight_decay and not mixer.x_proj.weight.requires_grad


def test_a_selection_keeps_rows_and_columns_to_the_bit() -> None:
    model = tiny_mamba()
    mixer, kept = model.backbone.layers[0].mixer, torch.tensor([0, 5])
    A_log, weight = mixer.A_log.detach().clone(), mixer.x_proj.weight.detach().clone()
    cut_all(model, [Truncation.from_indices(kept, 8)] * 2)
    assert torch.equal(mixer.A_log, A_log[:, kept])
    assert torch.equal(mixer.x_proj.weight, torch.cat([weight[:3], weight[3:11][kept], weight[11:][kept]]))


def test_rollback_restores_every_tensor_and_size() -> None:
    model = tiny_mamba()
    parameters = dict(model.named_parameters())
    change = cut_all(model, [Truncation.from_indices(torch.tensor([1, 4]), 8)] * 2)
    change.rollback()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.state_size == 8
    assert [layer.state_size for layer in find_layers(model)] == [8, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = tiny_mamba().to(dtype)
    cut_all(model, [Truncation.from_indices(torch.tensor([1, 4]), 8)] * 2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_another_state_size_is_refused() -> None:
    layer = find_layers(tiny_mamba())[0]
    with pytest.raises(DimensionError, match="is for 5 states; backbone.layers.0.mixer has 8"):
        layer.reduce(Truncation.from_indices(torch.tensor([1]), 5))


def test_a_truncation_that_mixes_states_is_refused() -> None:
    layer = find_layers(tiny_mamba())[0]
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    with pytest.raises(TruncationError, match="mixes states"):
        layer.reduce(Truncation(T=basis, W=basis))


def test_a_fold_that_overflows_the_dtype_is_refused() -> None:
    layer = find_layers(tiny_mamba().to(torch.float16))[0]
    T = torch.zeros(8, 1, dtype=torch.float64)
    T[0, 0], T[1:, 0] = 1, 1e7
    with pytest.raises(TruncationError, match="not finite in torch.float16"):
        layer.reduce(Truncation.from_indices(torch.tensor([0]), 8, T=T))


def test_generation_with_a_cache_agrees_with_generation_without_one() -> None:
    model, batch = tiny_mamba(), token_batch(batch=2, length=6)
    cut_all(model, [Truncation.from_indices(torch.tensor([0, 1, 5]), 8)] * 2)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(batch["input_ids"], use_cache=True, **settings)
    without = model.generate(batch["input_ids"], use_cache=False, **settings)
    assert with_cache.shape == (2, 14) and torch.equal(with_cache, without)
    cache = model(batch["input_ids"], use_cache=True).cache_params
    states = cache.layers[0].recurrent_states
    states = states[0] if isinstance(states, (list, tuple, dict)) else states
    assert states.shape == (2, 32, 3), "the recurrent cache has the reduced size"


@pytest.fixture
def mamba_ssm_module():
    """A module with the names, shapes and calls of mamba-ssm's `Mamba`, whose own package needs CUDA to be imported."""
    source = types.ModuleType("stand_in_for_mamba_simple")
    exec(MAMBA_SSM_STAND_IN, vars(source))
    sys.modules[source.__name__] = source
    torch.manual_seed(0)
    yield source.Mamba()
    del sys.modules[source.__name__]


MAMBA_SSM_STAND_IN = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

CALLS = []

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    CALLS.append("scan")
    return mamba_selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                                return_last_state=return_last_state)

def mamba_inner_fn(*args, **kwargs):
    raise AssertionError("the fused path hides the scan from the calibration")

class Mamba(nn.Module):
    def __init__(self, d_model=8, d_state=6, d_inner=16, dt_rank=2):
        super().__init__()
        self.d_state, self.dt_rank, self.use_fast_path = d_state, dt_rank, True
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 4, groups=d_inner, padding=3)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, hidden_states):
        length = hidden_states.shape[1]
        xz = self.in_proj(hidden_states).mT
        A = -torch.exp(self.A_log.float())
        if self.use_fast_path:
            return mamba_inner_fn(xz, A)
        x, z = xz.chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :length])
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = self.dt_proj.weight @ dt.mT
        y = selective_scan_fn(x, dt, A, B.mT.contiguous(), C.mT.contiguous(), self.D.float(), z=z,
                              delta_bias=self.dt_proj.bias.float(), delta_softplus=True)
        return self.out_proj(y.mT)
"""


def test_a_mamba_ssm_module_is_observed_and_cut(mamba_ssm_module) -> None:
    model = nn.Sequential(mamba_ssm_module)
    (layer,) = find_layers(model)
    assert (layer.name, layer.state_size, layer.family) == ("0", 6, "mamba")
    seen = []

    class Watcher:
        def observe(self, inputs, output):
            seen.append((inputs, output))
            return output

    x = torch.randn(2, 10, 8)
    with layer.observed(Watcher()):
        model(x)
    assert mamba_ssm_module.use_fast_path, "the fast path is back"
    inputs, output = seen[0]
    assert inputs.u.shape == inputs.delta.shape == output.shape == (2, 10, 16)
    assert inputs.B.shape == inputs.C.shape == (2, 10, 6) and (inputs.delta > 0).all()
    cut_all(model, [Truncation.from_indices(torch.tensor([0, 2]), 6)])
    assert mamba_ssm_module.d_state == 2 and mamba_ssm_module.A_log._no_weight_decay
    mamba_ssm_module.use_fast_path = False
    assert model(x).shape == (2, 10, 8)


def test_what_an_observer_sees_is_what_the_layer_computes() -> None:
    """The inputs that the observer gets, run through a plain loop, give the layer's output."""
    model, batch = tiny_mamba(), token_batch()
    layer = find_layers(model)[0]
    seen = []

    class Watcher:
        def observe(self, inputs, output):
            seen.append((inputs, output))
            return output

    gated = []
    handle = layer.module.out_proj.register_forward_pre_hook(lambda module, args: gated.append(args[0]))
    projected = []
    layer.module.in_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    with layer.observed(Watcher()), torch.no_grad():
        model(batch["input_ids"], use_cache=False)
    handle.remove()
    inputs, output = seen[0]
    h, rows = torch.zeros(4, 32, 8), []
    for t in range(20):
        decay = torch.exp(inputs.delta[:, t, :, None] * inputs.A)
        h = decay * h + (inputs.delta[:, t] * inputs.u[:, t])[..., None] * inputs.B[:, t, None]
        rows.append((h * inputs.C[:, t, None]).sum(-1))
    y = torch.stack(rows, 1)
    torch.testing.assert_close(output, y, rtol=1e-4, atol=1e-6)
    gate = F.silu(projected[0].chunk(2, dim=-1)[1])
    torch.testing.assert_close(gated[0], (y + inputs.u * layer.module.D) * gate, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inputs.A, -layer.module.A_log.detach().exp())
