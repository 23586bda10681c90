"""Every selective family: a cut of states that do nothing changes nothing, in every pass and in what is saved."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn

import hf_compressm
from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import StateSpaceLayer, config_changes, find_layers
from hf_compressm.architectures.families.gated_delta_net import GatedDeltaNetLayer
from hf_compressm.architectures.families.multi_head import MultiHeadLayer
from hf_compressm.architectures.families.zamba import ZambaLayer
from hf_compressm.architectures.scans import multi_head as chunk_scan_switch
from hf_compressm.architectures.scans import switch as scan_switch
from hf_compressm.architectures.state_layout import StateAxis, States
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.errors import DimensionError, TruncationError, UnsupportedModelError
from hf_compressm.systems import Truncation
from tests.cases import SELECTIVE_CASES, case_id, logits_of, size_in_config

FAMILY_CASES = [case for case in SELECTIVE_CASES if case.family != "mamba"]
N, KEPT = 8, 3
every_family = pytest.mark.parametrize("case", FAMILY_CASES, ids=case_id)


def cut_all(model: nn.Module, truncations: list[Truncation]) -> ModelChange:
    layers = find_layers(model)
    reductions = [layer.reduce(truncation) for layer, truncation in zip(layers, truncations)]
    sizes = {reduction.layer.name: reduction.state_size for reduction in reductions}
    change = ModelChange(model, reductions, config_changes(layers, sizes))
    change.commit()
    return change


def random_states(count: int, generator: torch.Generator) -> Tensor:
    """KEPT of N states for each of `count` groups, ascending."""
    return torch.stack([torch.randperm(N, generator=generator)[:KEPT].sort().values for _ in range(count)])


@torch.no_grad()
def silence(layer: StateSpaceLayer, generator: torch.Generator) -> Truncation:
    """Let all states but random ones do nothing, and return the selection of those."""
    mixer = layer.module
    if isinstance(layer, MultiHeadLayer):
        kept = random_states(layer.groups, generator)
        for group, states in enumerate(kept):
            dropped = torch.tensor([n for n in range(N) if n not in states.tolist()])
            # Nothing drives some of them, nothing reads the others.
            undriven, unread = dropped[::2] + group * N, dropped[1::2] + group * N + layer.groups * N
            first = {
                "in_proj": mixer.in_proj.out_features - layer.heads - 2 * layer.groups * N,
                "conv1d": mixer.conv1d.out_channels - 2 * layer.groups * N,
            }
            for name, parameter in layer.state_parameters().items():
                parameter[first[name.split(".")[0]] + torch.cat([undriven, unread])] = 0
        return Truncation.from_indices(kept, N)
    if isinstance(layer, GatedDeltaNetLayer):
        kept = random_states(layer.key_heads, generator)
        # The norm of q and of k sees what is driven, so nothing may drive a state on either side.
        dropped = torch.stack([torch.tensor([n for n in range(N) if n not in states]) for states in kept.tolist()])
        for axis, parameter in zip(layer.layout.axes, layer.state_parameters().values()):
            for entry in axis.kept(dropped, N).tolist():
                if entry in _state_entries(axis):
                    parameter[entry] = 0
        return Truncation.from_indices(kept, N)
    if isinstance(layer, ZambaLayer):
        kept = random_states(layer.heads, generator)
        for head, states in enumerate(kept):
            dropped = torch.tensor([n for n in range(N) if n not in states.tolist()])
            mixer.x_proj_weight[head, mixer.time_step_rank + dropped] = 0
        return Truncation.from_indices(kept, N)
    # A norm's mean square changes with the number of states, in B and in C.
    [kept] = random_states(1, generator)
    dropped = torch.tensor([n for n in range(N) if n not in kept.tolist()])
    mixer.x_proj.weight[layer.time_step_rank + torch.cat([dropped, N + dropped])] = 0
    return Truncation.from_indices(kept, N)


def _state_entries(axis: StateAxis) -> set[int]:
    """The entries along an axis of N states a group that belong to some state."""
    found, start = set(), 0
    for entry in axis.entries:
        length = N if isinstance(entry, States) else entry
        found |= set(range(start, start + length)) if isinstance(entry, States) else set()
        start += length
    return found


def silenced(case) -> tuple[nn.Module, list[Truncation]]:
    model, generator = case.build(), torch.Generator().manual_seed(3)
    leave_out_epsilons(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv1d.bias") or "layernorm.weight" in name:
                parameter.normal_(1.0, 0.3)
    return model, [silence(layer, generator) for layer in find_layers(model)]


def leave_out_epsilons(model: nn.Module) -> None:
    """
    What is added to a mean square for safety weighs more when the mean is over fewer states.

    The same goes for the output's norm of linear attention, in which the scale of queries cancels.
    """
    for layer in find_layers(model):
        outputs = ("norm", "o_norm") if isinstance(layer, GatedDeltaNetLayer) else ()
        for name in ("b_layernorm", "c_layernorm", *outputs):
            norm = getattr(layer.module, name, None)
            for epsilon in ("eps", "variance_epsilon"):
                if hasattr(norm, epsilon):
                    setattr(norm, epsilon, 0.0)


@every_family
@pytest.mark.parametrize("use_cache", [False, True])
def test_cutting_states_that_do_nothing_changes_nothing(case, use_cache: bool) -> None:
    model, truncations = silenced(case)
    batch = {**case.batch(), "use_cache": use_cache}
    before = logits_of(model, batch)
    cut_all(model, truncations)
    assert [layer.state_size for layer in find_layers(model)] == [KEPT] * case.layers
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("score", ["hankel", "greedy", "readout_energy"])
def test_the_states_that_do_something_are_found(case, score: str) -> None:
    """From measured Gramians to the cut: with every score the silent states go, and nothing changes."""
    model, truncations = silenced(case)
    batch = case.batch()
    before = logits_of(model, batch)
    config = CompreSSMConfig(
        strategy="target", target_state_size=KEPT, reductor="selection", selection_score=score, stock=True
    )
    record = compress(model, [batch], config)
    assert record.outcome == "cut" and [layer.size_after for layer in record.layers] == [KEPT] * case.layers
    assert record.layers[0].lost_energy < 1e-9
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["falcon_mamba", "jamba"])
def test_what_a_norm_over_fewer_states_takes_away_is_measured(family: str) -> None:
    """With correlated inputs the lengths of the projection's rows do not tell what enters the norms."""
    [case] = [case for case in FAMILY_CASES if case.name == family]
    model, batch = case.build(), case.batch(batch=16)
    leave_out_epsilons(model)
    layer = find_layers(model)[0]
    gramians = calibrate(model, [layer], [batch], progress=False).gramians[layer.name]
    truncation = gramians.truncate(KEPT, "selection", CompreSSMConfig())
    watchers = []
    for cut in (None, truncation, dataclasses.replace(truncation, squares=None)):
        twin = copy.deepcopy(model)
        if cut is not None:
            cut_layer = find_layers(twin)[0]
            ModelChange(twin, [cut_layer.reduce(cut)]).commit()
        watchers.append(Watcher())
        with find_layers(twin)[0].observed(watchers[-1]):
            logits_of(twin, {**batch, "use_cache": False})
    kept = truncation.indices
    full, measured, estimated = ([M.square().mean((0, 1)) for M in (w.seen[0][0].B, w.seen[0][0].C)] for w in watchers)
    # How far the kept entries are from their size before the cut, B and C together.
    ratios = [math.prod(float((after[i].mean() / full[i][kept].mean()).sqrt()) for i in (0, 1))
              for after in (measured, estimated)]  # fmt: skip
    if family == "falcon_mamba":  # the output projection makes up for B and C
        for number, cut in enumerate((truncation, dataclasses.replace(truncation, squares=None))):
            output = layer.reduce(cut).parameters[-1]
            ratios[number] *= float((output.new / output.old).detach().median())
    assert abs(ratios[0] - 1) < 0.02 < abs(ratios[1] - 1)


@every_family
def test_gradients_after_the_cut_are_those_that_the_moment_map_predicts(case) -> None:
    model, truncations = silenced(case)
    batch = case.batch()
    model.train()
    model(**batch, use_cache=False).loss.backward()
    old = {id(parameter): parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad()
    change = cut_all(model, truncations)
    model(**batch, use_cache=False).loss.backward()
    cut = {id(parameter.new): parameter for parameter in change.parameters}
    assert cut
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert id(parameter) not in cut
            continue
        if id(parameter) in cut:
            predicted = cut[id(parameter)].moment_map.first(old[id(cut[id(parameter)].old)])
        else:
            predicted = old[id(parameter)]
        torch.testing.assert_close(parameter.grad, predicted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@every_family
def test_generation_goes_on_as_before_with_a_smaller_cache(case) -> None:
    model, truncations = silenced(case)
    prompt = case.batch()["input_ids"][:2, :7]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    states = recurrent_states(model, prompt)
    cut_all(model, truncations)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **settings), expected)
    smaller = recurrent_states(model, prompt)
    assert len(smaller) == len(states) == case.layers
    for before, after in zip(states, smaller):
        axis = 2 if isinstance(find_layers(model)[0], GatedDeltaNetLayer) else before.ndim - 1
        assert before.shape[axis] == N
        assert after.shape == (*before.shape[:axis], KEPT, *before.shape[axis + 1 :])


def recurrent_states(model: nn.Module, prompt: Tensor) -> list[Tensor]:
    """The recurrent states in a cache of the prompt, of all layers that have one."""
    outputs = model(prompt, use_cache=True)
    cache = outputs.get("cache_params", None) or outputs.past_key_values
    found = []
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        states = list(states.values()) if isinstance(states, dict) else states
        states = states if isinstance(states, (list, tuple)) else [states]
        found += [state for state in states if isinstance(state, Tensor)]
    # The cache of MiniMax has them in a list of their own.
    return found + [state for state in getattr(cache, "linear_cache", []) if isinstance(state, Tensor)]


@every_family
def test_the_stock_class_loads_what_is_saved(case, tmp_path) -> None:
    model, truncations = silenced(case)
    cut_all(model, truncations)
    assert size_in_config(model) == KEPT and type(size_in_config(model)) is int
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    leave_out_epsilons(loaded)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits_of(loaded, case.batch()), logits_of(model, case.batch()))
    fresh, stored = mixers(loaded), mixers(model)
    for module, other in zip(fresh, stored, strict=True):
        assert repr(module) == repr(other)
        sizes = {name: value for name, value in vars(module).items() if isinstance(value, int)}
        assert sizes == {name: vars(other)[name] for name in sizes}
        for (name, buffer), (_, cut) in zip(module.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(cut, buffer, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def mixers(model: nn.Module) -> list[nn.Module]:
    return [layer.module for layer in find_layers(model)]


@every_family
def test_a_cut_to_full_size_changes_nothing(case) -> None:
    model, batch = case.build(), case.batch()
    before = logits_of(model, batch)
    cut_all(model, [Truncation.from_indices(torch.arange(N), N)] * case.layers)
    assert torch.equal(logits_of(model, batch), before)


@every_family
def test_a_layer_takes_any_size_before_a_load(case) -> None:
    """Smaller and larger: every tensor and size is that of a model that was built so."""
    for size in (5, 11):
        model, built = case.build(), case.build(state_size=size)
        layers = find_layers(model)
        states = built.state_dict()
        for layer, twin in zip(layers, find_layers(built)):
            assert layer.saved_state_size(states, f"{layer.name}.") == size
            layer.resize(size)
            assert repr(layer.module) == repr(twin.module)
        for change in config_changes(layers, {}):
            setattr(change.owner, change.name, change.value)
        assert size_in_config(model) == size
        model.load_state_dict(states)
        for name, buffer in built.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)
        assert torch.equal(logits_of(model, case.batch()), logits_of(built, case.batch()))


@every_family
def test_rollback_restores_every_tensor_and_size(case) -> None:
    model, batch = case.build(), case.batch()
    before, parameters = logits_of(model, batch), dict(model.named_parameters())
    config = model.config.to_dict()
    change = cut_all(model, [Truncation.from_indices(torch.tensor([1, 4]), N)] * case.layers)
    assert model.config.to_dict() != config
    change.rollback()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_dict() == config and torch.equal(logits_of(model, batch), before)


@every_family
def test_what_cannot_be_held_is_refused_and_the_layer_named(case) -> None:
    model = case.build()
    layer = find_layers(model)[0]
    with pytest.raises(DimensionError, match=f"is for 5 states; {layer.name} has 8"):
        layer.reduce(Truncation.from_indices(torch.tensor([1]), 5))
    if "balanced" in layer.reductors(stock=False):
        return
    basis = torch.linalg.qr(torch.randn(N, KEPT, dtype=torch.float64)).Q
    scale = torch.linspace(1, 2, N, dtype=torch.float64)[:, None]
    with pytest.raises(TruncationError, match=f"{layer.name} .a {case.family} layer"):
        layer.reduce(Truncation(T=basis / scale, W=basis * scale))


def test_a_projection_inside_an_adapter_is_refused() -> None:
    [case] = [case for case in FAMILY_CASES if case.name == "mamba2"]
    model = case.build()
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = nn.Sequential(mixer.in_proj)
    with pytest.raises(UnsupportedModelError, match="in_proj is a Sequential and not a torch.nn.Linear"):
        find_layers(model)


class Watcher:
    """Keeps what an observer is shown."""

    def __init__(self) -> None:
        self.seen = []

    def observe(self, inputs, output):
        self.seen.append((inputs, output))
        return output


@every_family
def test_an_observed_layer_computes_what_it_computes_unobserved(case) -> None:
    model, batch = case.build(), case.batch()
    before = logits_of(model, batch)
    layer, watcher = find_layers(model)[0], Watcher()
    with layer.observed(watcher):
        torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-5, atol=1e-6)
    steps = [getattr(inputs, "delta", None) for inputs, _ in watcher.seen]
    assert steps and all(delta is None or (delta > 0).all() for delta in steps)
    assert torch.equal(logits_of(model, batch), before)


def test_time_steps_are_observed_inside_their_limits() -> None:
    [case] = [case for case in FAMILY_CASES if case.name == "mamba2"]
    model = case.build(time_step_limit=(0.2, 0.3))
    layer, watcher = find_layers(model)[0], Watcher()
    with layer.observed(watcher):
        before = logits_of(model, case.batch())
    [(inputs, output)] = watcher.seen
    assert float(inputs.delta.min()) == pytest.approx(0.2) and float(inputs.delta.max()) == pytest.approx(0.3)
    torch.testing.assert_close(before, logits_of(model, case.batch()))
    # The observed inputs, through a plain loop, give the observed output.
    B, C = (M.repeat_interleave(2, dim=2) for M in (inputs.B, inputs.C))
    h, rows = torch.zeros(4, 4, 8, N), []
    for t in range(20):
        decay = torch.exp(inputs.delta[:, t] * inputs.A)[..., None, None]
        h = decay * h + (inputs.delta[:, t, :, None] * inputs.u[:, t])[..., None] * B[:, t, :, None]
        rows.append((h * C[:, t, :, None]).sum(-1))
    torch.testing.assert_close(output, torch.stack(rows, 1), rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("use_cache", [False, True])
def test_the_fast_scan_gives_what_the_stock_path_gives(case, use_cache: bool) -> None:
    batch = {**case.batch(), "use_cache": use_cache}
    results = []
    for fast in (False, True):
        model = case.build().train(not use_cache)
        with hf_compressm.fast_cpu_scan(fast):
            output = model(**batch)
            output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for stock, fused in zip(*results, strict=True):
        assert stock.dtype == fused.dtype
        assert (stock - fused).norm() <= 1e-4 * stock.norm() + 1e-9


@every_family
def test_generation_and_its_cache_are_those_of_the_stock_path(case) -> None:
    model, prompt = case.build(), case.batch()["input_ids"][:2, :7]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock, states = model.generate(prompt, **settings), recurrent_states(model, prompt)
    with hf_compressm.fast_cpu_scan():
        assert torch.equal(model.generate(prompt, **settings), stock)
        for one, other in zip(recurrent_states(model, prompt), states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{"seq_idx": torch.zeros(2, 9)}, {"cu_seqlens": torch.zeros(2)}], ids=str)
def test_packed_sequences_are_left_to_the_stock_scan(extra: dict, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(chunk_scan_switch, "multi_head_scan", lambda *_: called.append("fast"))
    x, dt, B = torch.zeros(2, 9, 4, 3), torch.zeros(2, 9, 4), torch.zeros(2, 9, 1, 5)
    scan = chunk_scan_switch.chunk_scan_replacement(lambda *args, **kwargs: called.append(kwargs))
    with hf_compressm.fast_cpu_scan():
        scan(x, dt, torch.zeros(4), B, B, 8, D=torch.ones(4), **extra)
    [kwargs] = called
    assert extra.items() <= kwargs.items() and kwargs["D"] is not None


def test_what_is_observed_of_packed_sequences_is_warned_of_once(caplog, monkeypatch) -> None:
    class Look:
        def observe(self, inputs, output):
            return output

    scan_switch.warn_of_packing.cache_clear()
    x, dt, B = torch.zeros(2, 9, 4, 3), torch.zeros(2, 9, 4), torch.zeros(2, 9, 1, 5)
    scan = chunk_scan_switch.chunk_scan_replacement(lambda *args, **kwargs: torch.zeros(2, 9, 4, 3))
    monkeypatch.setattr(chunk_scan_switch, "current_observer", Look)
    for extra in ({}, {"seq_idx": torch.zeros(2, 9)}, {"cu_seqlens": torch.zeros(2)}):
        scan(x, dt, torch.zeros(4), B, B, 8, **extra)
    assert [record.message for record in caplog.records if "packed sequences" in record.message] == [
        "The calibration batches hold packed sequences. Their Gramians are measured as if the state went on from one "
        "sequence into the next; give calibration_batches that are not packed for exact ones."
    ]


class Pair(nn.Module):
    """A model that holds a stock model, with a config that holds a copy of that one's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = type("PairConfig", (), {})()
        self.config.model_type = "pair"
        self.config.state_size = 100
        self.config.text_config = copy.deepcopy(inner.config)


@every_family
def test_configs_further_out_follow(case) -> None:
    model = Pair(case.build())
    cut_all(model, [Truncation.from_indices(torch.tensor([1, 4]), N)] * case.layers)
    [name] = {layer.stock.config_size_name for layer in find_layers(model)}
    assert getattr(model.config.text_config, name) == getattr(model.inner.config, name) == 2
    assert model.config.state_size == 100, "a config of another kind may mean something else by the name"


@pytest.fixture
def mamba_ssm_mamba2():
    """A class with the names, shapes and calls of mamba-ssm's `Mamba2`, whose package needs CUDA to be imported."""
    source = types.ModuleType("stand_in_for_mamba2")
    exec(MAMBA2_STAND_IN, vars(source))
    sys.modules[source.__name__] = source
    torch.manual_seed(0)
    yield source.Mamba2
    del sys.modules[source.__name__]


MAMBA2_STAND_IN = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as reference

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False):
    y = reference(x, dt, A, B, C, chunk_size, D=None, dt_bias=dt_bias, dt_softplus=dt_softplus,
                          dt_limit=dt_limit)
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None])
    return y * F.silu(z) if z is not None else y

def mamba_split_conv1d_scan_combined(*args, **kwargs):
    raise AssertionError("the fused path hides the scan from the calibration")

class Mamba2(nn.Module):
    def __init__(self, d_model=8, d_state=6, headdim=4, ngroups=2, d_ssm=None, D_has_hdim=False, rmsnorm=True):
        super().__init__()
        self.d_state, self.headdim, self.ngroups, self.rmsnorm = d_state, headdim, ngroups, rmsnorm
        self.d_inner = 2 * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads, self.D_has_hdim, self.use_mem_eff_path = self.d_ssm // headdim, D_has_hdim, True
        self.chunk_size, self.dt_limit = 4, (0.01, 0.5)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=False)
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, 4, groups=conv_dim, padding=3)
        self.dt_bias = nn.Parameter(torch.zeros(self.nheads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, self.nheads + 1)))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = nn.RMSNorm(self.d_ssm)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, u):
        zxbcdt = self.in_proj(u)
        A = -torch.exp(self.A_log.float())
        if self.use_mem_eff_path:
            return mamba_split_conv1d_scan_combined(zxbcdt, A)
        width = self.ngroups * self.d_state
        d_mlp = (zxbcdt.shape[-1] - 2 * self.d_ssm - 2 * width - self.nheads) // 2
        z0, x0, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, self.d_ssm, self.d_ssm + 2 * width, self.nheads], dim=-1)
        xBC = F.silu(self.conv1d(xBC.mT)[..., : u.shape[1]].mT)
        x, B, C = xBC.split([self.d_ssm, width, width], dim=-1)
        heads = lambda t: t.unflatten(-1, (-1, self.headdim))
        groups = lambda t: t.unflatten(-1, (self.ngroups, -1))
        y = mamba_chunk_scan_combined(
            heads(x), dt, A, groups(B), groups(C), chunk_size=self.chunk_size,
            D=self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            z=heads(z) if not self.rmsnorm else None, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=self.dt_limit,
        ).flatten(2)
        y = self.norm(y * F.silu(z)) if self.rmsnorm else y
        y = torch.cat([F.silu(z0) * x0, y], dim=-1) if d_mlp > 0 else y
        return self.out_proj(y)
"""


@pytest.mark.parametrize(
    "settings", [{}, {"rmsnorm": False, "D_has_hdim": True}, {"d_ssm": 8}, {"ngroups": 1}], ids=str
)
def test_a_mamba_ssm_module_is_observed_and_cut(mamba_ssm_mamba2, settings: dict) -> None:
    mixer = mamba_ssm_mamba2(**settings)
    model = nn.Sequential(mixer)
    model.config = types.SimpleNamespace(ssm_cfg={"layer": "Mamba2", "d_state": 6})
    (layer,) = find_layers(model)
    assert (layer.name, layer.state_size, layer.family) == ("0", 6, "mamba2")
    x, watcher = torch.randn(2, 10, 8), Watcher()
    mixer.use_mem_eff_path = False
    before = model(x)
    mixer.use_mem_eff_path = True
    with layer.observed(watcher):
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert mixer.use_mem_eff_path, "the fused path is back"
    [(inputs, _)] = watcher.seen
    assert float(inputs.delta.detach().max()) <= 0.5 and inputs.B.shape == (2, 10, mixer.ngroups, 6)

    # Let two states of each group do nothing, and cut them.
    kept = torch.tensor([0, 2, 3, 5])
    width = mixer.ngroups * 6
    undriven = torch.cat([6 * group + torch.tensor([1, 4]) for group in range(mixer.ngroups)])
    with torch.no_grad():
        mixer.in_proj.weight[mixer.in_proj.out_features - mixer.nheads - 2 * width + undriven] = 0
        mixer.conv1d.weight[mixer.conv1d.out_channels - 2 * width + undriven] = 0
        mixer.conv1d.bias[mixer.conv1d.out_channels - 2 * width + undriven] = 0
    mixer.use_mem_eff_path = False
    before = model(x)
    cut_all(model, [Truncation.from_indices(kept, 6)])
    assert mixer.d_state == 4 and model.config.ssm_cfg == {"layer": "Mamba2", "d_state": 4}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
