"""xLSTM: truncations of the key dimension, folded into the projections, in the classes of transformers."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import StateForm, all_changes, find_layers, unsupported_note
from hf_compressm.architectures.scans.mlstm import watching_mlstm
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.errors import CalibrationError, ConfigurationError, DimensionError, UnsupportedModelError
from hf_compressm.systems import Truncation
from tests.architectures.test_delta_rule_scan import Look
from tests.cases import logits_of, token_batch
from tests.training.test_callback import Notes, Rows, make_trainer
from tests.training.test_resume import SAVES, StopAt
from tests.xlstm_models import HEADS, KEY_DIM, tiny_xlstm

N, KEPT, LENGTH = KEY_DIM, 8, 20
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
every_weight_mode = pytest.mark.parametrize("weight_mode", ["single", "fused"])


def key_rows(mixer: nn.Module, parameter: str = "weight") -> Tensor:
    """A view of what makes the keys, `(heads, N, ...)`."""
    if hasattr(mixer, "k"):
        return getattr(mixer.k, parameter).unflatten(0, (HEADS, -1))
    return getattr(mixer.qkv_opreact, parameter)[mixer.qk_dim : 2 * mixer.qk_dim].unflatten(0, (HEADS, -1))


@torch.no_grad()
def redundant(**settings) -> tuple[nn.Module, list[Truncation]]:
    """A model whose keys lie, in each head, in a random space of KEPT dimensions; and oblique pairs that know it."""
    model, generator, truncations = tiny_xlstm(**settings), torch.Generator().manual_seed(3), []
    for layer in find_layers(model):
        T = torch.randn(HEADS, N, KEPT, dtype=torch.float64, generator=generator)
        weights = torch.rand(HEADS, N, 1, dtype=torch.float64, generator=generator) + 0.5
        W = (weights * T) @ torch.linalg.inv(T.mT @ (weights * T))
        rows = [key_rows(layer.module)]
        if settings.get("use_bias"):
            for module in layer.module.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.normal_(0.0, 0.3, generator=generator)
            rows.append(key_rows(layer.module, "bias").unsqueeze(-1))
        for keys in rows:
            keys.copy_((T @ (W.mT @ keys.double())).to(keys.dtype))
        truncations.append(Truncation(T=T, W=W))
    return model, truncations


def cut_with(model: nn.Module, truncations: list[Truncation]) -> ModelChange:
    layers = find_layers(model)
    reductions = [layer.reduce(one) for layer, one in zip(layers, truncations)]
    change = ModelChange(model, reductions, all_changes(model, layers, reductions))
    change.commit()
    return change


def halved(model: nn.Module, **settings) -> nn.Module:
    record = compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", **settings), progress=False)
    assert record.outcome == "cut", record.reason
    return model.eval()


@torch.no_grad()
def states_of(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, ...]]:
    """Matrix, normaliser and m of each layer in a cache of some tokens."""
    outputs = model(input_ids=tokens, use_cache=True)
    # transformers 5.24 calls it so.
    return list((outputs["cache"] if "cache" in outputs else outputs["cache_params"]).rnn_state.values())


@every_weight_mode
def test_layers_are_found(weight_mode: str) -> None:
    model = tiny_xlstm(weight_mode=weight_mode)
    layers = find_layers(model)
    assert [(layer.name, layer.family, layer.form, layer.cache_multiple) for layer in layers] == [
        (f"backbone.blocks.{number}.mlstm_layer", "xlstm", StateForm(N, N), 8) for number in (0, 1)
    ]
    assert unsupported_note(model, layers) is None


@every_weight_mode
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_cutting_what_is_redundant_changes_nothing(weight_mode: str, use_cache: bool, use_bias: bool) -> None:
    """The matrix and the normaliser, in the chunks and in the steps that are left of them."""
    model, truncations = redundant(weight_mode=weight_mode, use_bias=use_bias)
    batch = {**token_batch(), "use_cache": use_cache}
    before, classes = logits_of(model, batch), [type(module) for module in model.modules()]
    cut_with(model, truncations)
    assert [layer.form for layer in find_layers(model)] == [(KEPT, KEPT)] * 2
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("reductor, tolerance", [("auto", 1e-3), ("interpolative", 1e-2)])
def test_what_is_redundant_is_found(reductor: str, tolerance: float) -> None:
    """A quotient by a small normaliser shows the rounding of a worse conditioned pair."""
    model, _ = redundant()
    before = logits_of(model, token_batch())
    config = CompreSSMConfig(strategy="target", target_state_size=KEPT, reductor=reductor)
    record = compress(model, [token_batch()], config, progress=False)
    assert record.outcome == "cut" and record.layers[0].lost_energy < 1e-9
    torch.testing.assert_close(logits_of(model, token_batch()), before, rtol=tolerance, atol=tolerance)


@every_weight_mode
def test_gradients_after_the_cut_are_those_that_the_moment_map_predicts(weight_mode: str) -> None:
    model, truncations = redundant(weight_mode=weight_mode)
    model.train()
    model(**token_batch()).loss.backward()
    old = {id(parameter): parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad()
    change = cut_with(model, truncations)
    model(**token_batch()).loss.backward()
    cut = {id(parameter.new): parameter for parameter in change.parameters}
    assert cut
    for name, parameter in model.named_parameters():
        if id(parameter) in cut:
            predicted = cut[id(parameter)].moment_map.first(old[id(cut[id(parameter)].old)])
        else:
            predicted = old[id(parameter)]
        torch.testing.assert_close(parameter.grad, predicted, rtol=1e-2, atol=1e-4, msg=name)


def test_generation_goes_on_as_before_with_a_smaller_cache() -> None:
    model, truncations = redundant()
    prompt = token_batch()["input_ids"][:2, :7].clamp(min=1)
    expected, states = model.generate(prompt, **GENERATION), states_of(model, prompt)
    cut_with(model, truncations)
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt, use_cache=use_cache, **GENERATION), expected)
    smaller = states_of(model, prompt)
    assert [[part.shape for part in layer] for layer in states] == [
        [(2, HEADS, N, 8), (2, HEADS, N), (2, HEADS, 1)]
    ] * 2
    assert [[part.shape for part in layer] for layer in smaller] == [
        [(2, HEADS, KEPT, 8), (2, HEADS, KEPT), (2, HEADS, 1)]
    ] * 2
    for layer, cut, truncation in zip(states, smaller, truncations):
        torch.testing.assert_close(truncation.T.float() @ cut[0], layer[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((truncation.T.float() @ cut[1][..., None])[..., 0], layer[1], rtol=1e-3, atol=1e-4)


def test_what_is_observed_is_the_recurrence() -> None:
    """A plain loop over its steps gives the output that was seen, and Gramians those of the loop's states."""
    model, look, batch = tiny_xlstm(), Look(), token_batch()
    before, layer = logits_of(model, batch), find_layers(model)[1]
    with layer.observed(look):
        assert torch.equal(logits_of(model, batch), before)
    logits_of(model, batch)
    [(inputs, output)] = look.seen
    assert inputs.B.shape == inputs.C.shape == (4, LENGTH, HEADS, N) and inputs.eps == model.config.eps
    assert inputs.rows == 4 * LENGTH * 9 and inputs.states_per_sequence == HEADS * N * 9
    v, i, f, k, q = (x.detach().double() for x in (inputs.u, inputs.input_gate, inputs.forget_gate, inputs.B, inputs.C))
    m, states, outputs = torch.zeros(4, HEADS, dtype=torch.float64), [], []
    state = torch.zeros(4, HEADS, N, 9, dtype=torch.float64, requires_grad=True)
    for t in range(LENGTH):
        forget = nn.functional.logsigmoid(f[:, t])
        m, last = torch.maximum(forget + m, i[:, t]), m
        column = torch.cat([v[:, t], torch.ones(4, HEADS, 1)], -1)[..., None, :]
        state = (forget + last - m).exp()[..., None, None] * state + (i[:, t] - m).exp()[..., None, None] * (
            k[:, t, ..., None] * column
        )
        state.retain_grad()
        states.append(state)
        read = (q[:, t, ..., None] * state).sum(2)
        outputs.append(read[..., :8] / (torch.maximum(read[..., 8:].abs(), torch.exp(-m)[..., None]) + inputs.eps))
    found = torch.stack(outputs, 1)
    torch.testing.assert_close(output.detach().double(), found.detach(), rtol=1e-3, atol=1e-4)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weights * found).sum().backward()
    times = torch.arange(LENGTH).expand(4, -1)
    measured = inputs.detached().state_gramian(times)[0], inputs.detached().adjoint_gramian(weights.float(), times)
    for gramian, rows in zip(measured, (states, [state.grad for state in states])):
        expected = sum(torch.einsum("bhnv,bhmv->hnm", row.detach(), row.detach()) for row in rows)
        torch.testing.assert_close(gramian, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_balanced_cut_changes_the_output_less_than_channels() -> None:
    """On data that made no cut."""
    errors, others = {}, token_batch(batch=16, seed=9)
    for reductor in ("balanced", "selection"):
        model = tiny_xlstm(2 * N)
        before = logits_of(model, others)
        config = CompreSSMConfig(strategy="fixed", keep_ratio=0.75, reductor=reductor)
        assert compress(model, [token_batch(batch=16)], config, progress=False).outcome == "cut"
        errors[reductor] = float((logits_of(model, others) - before).norm() / before.norm())
    assert 2 * errors["balanced"] < errors["selection"]


@pytest.mark.parametrize("stock", [False, True])
def test_the_stock_class_loads_what_is_saved(stock: bool, tmp_path) -> None:
    """A fused xLSTM can't be loaded by transformers, cut or not."""
    model = halved(tiny_xlstm(), stock=stock)
    assert model.config.qk_dim_factor == 1.0 and model.config.qk_head_dim == KEPT
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(model, token_batch()))
    for layer, stored in zip(find_layers(loaded), find_layers(model)):
        assert layer.module.qk_dim == stored.module.qk_dim == HEADS * KEPT
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    tokens = token_batch()["input_ids"][:2, :7]
    assert torch.equal(loaded.generate(tokens, **GENERATION), model.generate(tokens, **GENERATION))


def test_sizes_are_those_that_the_cache_takes() -> None:
    """The cache of transformers rounds the key dimension of all heads up to a multiple of 64."""
    model = tiny_xlstm(24)
    with pytest.raises(ConfigurationError, match=r"state size to get is 10, but the cache of this model .xlstm. takes"):
        compress(model, [token_batch()], CompreSSMConfig(state_size=10), progress=False)
    layer = find_layers(model)[0]
    with pytest.raises(UnsupportedModelError, match="cannot have 10 states: the cache .* multiples of 8 with 8 heads"):
        layer.reduce(Truncation.from_indices(torch.arange(10), 24))
    with pytest.raises(DimensionError, match=f"is for 5 states; {layer.name} has 24"):
        layer.reduce(Truncation.from_indices(torch.tensor([1]), 5))
    with pytest.raises(UnsupportedModelError, match="uniform=False would give each layer its own state size"):
        compress(model, [token_batch()], CompreSSMConfig(strategy="tolerance", uniform=False), progress=False)
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.4)
    assert compress(model, [token_batch()], config, progress=False).outcome == "cut"
    assert [layer.state_size for layer in find_layers(model)] == [16] * 2, "10 is rounded up"
    # Where the cache does not fit as it is, no size is any worse.
    odd = tiny_xlstm(qk_dim_factor=HEADS * 10 / 64)
    assert [(layer.state_size, layer.cache_multiple) for layer in find_layers(odd)] == [(10, 1)] * 2
    assert compress(odd, [token_batch()], CompreSSMConfig(state_size=7), progress=False).outcome == "cut"
    assert logits_of(odd, token_batch()).isfinite().all()


def test_a_cut_to_full_size_changes_nothing() -> None:
    model = tiny_xlstm()
    before = logits_of(model, token_batch())
    cut_with(model, [Truncation.from_indices(torch.arange(N), N)] * 2)
    assert torch.equal(logits_of(model, token_batch()), before)


def test_rollback_restores_every_tensor_and_size() -> None:
    model = tiny_xlstm()
    before, parameters, config = logits_of(model, token_batch()), dict(model.named_parameters()), model.config.to_dict()
    change = cut_with(model, [Truncation.from_indices(torch.arange(0, N, 2), N)] * 2)
    assert model.config.to_dict() != config
    change.rollback()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_dict() == config and torch.equal(logits_of(model, token_batch()), before)


def test_other_gramians_and_analyze() -> None:
    spectrum = analyze(tiny_xlstm(), [token_batch(), token_batch(seed=1)], sizes=[KEPT])
    assert "mlstm_layer" in str(spectrum) and "8" in spectrum.size_table()
    halved(tiny_xlstm(), gramians="white_noise")
    with pytest.raises(CalibrationError, match="no means over time"):
        halved(tiny_xlstm(), gramians="averaged")
    model = tiny_xlstm(use_cache=True)
    layer = find_layers(model)[0]
    gramians = calibrate(model, [layer], [token_batch()], progress=False).gramians[layer.name]
    assert gramians.P.shape == gramians.Q.shape == (HEADS, N, N) and model.config.use_cache


def test_sequences_that_transformers_runs_in_pieces_are_measured_whole() -> None:
    """In pieces it takes the gradient off."""
    whole, pieces = tiny_xlstm(), tiny_xlstm()
    pieces.config.max_inference_chunksize = 8
    found = [compress(model, [token_batch()], CompreSSMConfig(ratio=0.5), progress=False) for model in (whole, pieces)]
    assert pieces.config.max_inference_chunksize == 8
    assert [record.outcome for record in found] == ["cut", "cut"]
    values = [record.layers[0].hankel_singular_values for record in found]
    assert values[0] == pytest.approx(values[1])


def test_layers_of_one_size_are_chosen_together() -> None:
    with pytest.raises(UnsupportedModelError, match=r"both or none with target_layers and exclude_layers\.$"):
        halved(tiny_xlstm(), exclude_layers=".*1.*")


def test_an_adapter_on_what_would_be_cut_is_refused() -> None:
    model = tiny_xlstm()
    model.backbone.blocks[0].mlstm_layer.k = nn.Sequential(model.backbone.blocks[0].mlstm_layer.k)
    with pytest.raises(UnsupportedModelError, match="mlstm_layer.k is a Sequential and not a torch.nn.Linear"):
        find_layers(model)


def test_configs_of_the_package_follow_with_the_model_s() -> None:
    """Where the package `xlstm` is installed, each layer has a config of that one."""
    model = tiny_xlstm()
    names = ("embedding_dim", "num_heads", "qk_dim_factor", "weight_mode", "gate_soft_cap")
    for block in model.backbone.blocks:
        block.mlstm_layer.config = types.SimpleNamespace(**{name: getattr(model.config, name) for name in names})
    halved(model)
    configs = [model.config, *(block.mlstm_layer.config for block in model.backbone.blocks)]
    assert [config.qk_dim_factor for config in configs] == [1.0] * 3
    with pytest.raises(UnsupportedModelError, match="their model class holds one state size for both"):
        halved(model, target_layers=["0.mlstm_layer"])


def test_the_package_s_names_for_the_arguments_are_known() -> None:
    class Backend(nn.Module):
        config = types.SimpleNamespace(eps=0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, None]:
            return 2 * v, None

    layer, look = nn.Module(), Look()
    layer.mlstm_backend = Backend()
    q, k, v = (torch.randn(3, 2, HEADS, LENGTH, N)).unbind()
    i, f = torch.randn(2, 2, HEADS, LENGTH).unbind()
    with watching_mlstm(layer, look):
        output, _ = layer.mlstm_backend(q=q, k=k, v=v, i=i, f=f)
    [(inputs, seen)] = look.seen
    assert torch.equal(output, 2 * v) and torch.equal(seen, 2 * v.transpose(1, 2)) and inputs.eps == 0.5
    expected = {"C": N**-0.5 * q, "B": k, "u": v, "input_gate": i, "forget_gate": f}
    assert all(torch.equal(getattr(inputs, name), x.transpose(1, 2)) for name, x in expected.items())


def build(state_size: int = 4 * N) -> nn.Module:
    return tiny_xlstm(state_size)


TWO_CUTS = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0.0, 0.5), interval=5)


@pytest.mark.parametrize("stop", [3, 7, 12])
def test_a_run_is_cut_twice_and_resumes(stop: int, tmp_path) -> None:
    rows, whole, parts, rest = Rows(token_batch(batch=64)), Notes(), Notes(), Notes()
    settings = {**SAVES, "save_steps": stop}
    reference = build()
    make_trainer(tmp_path / "a", CompreSSMCallback(TWO_CUTS), reference, rows, [whole], **settings).train()
    first = make_trainer(tmp_path / "b", CompreSSMCallback(TWO_CUTS), build(), rows, [parts, StopAt(stop)], **settings)
    first.train()
    model = build()
    make_trainer(tmp_path / "b", CompreSSMCallback(TWO_CUTS), model, rows, [rest], **settings).train(
        resume_from_checkpoint=True
    )
    assert [layer.state_size for layer in find_layers(model)] == [N] * 2 and model.config.qk_dim_factor == 2.0
    losses = parts.losses[:stop] + rest.losses[-(20 - stop) :]
    assert losses == pytest.approx(whole.losses, rel=1e-5) and all(map(math.isfinite, losses))
    for (name, found), expected in zip(model.state_dict().items(), reference.state_dict().values()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
