"""Kimi delta attention: kept channels that write, erase and decay, queries that read the others from them."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress, fast_cpu_scan
from hf_compressm.architectures import StateForm, config_changes, find_layers, unsupported_note
from hf_compressm.architectures.families.kimi_delta import KimiDeltaLayer
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.errors import CalibrationError, DimensionError, TruncationError, UnsupportedModelError
from hf_compressm.systems import Truncation
from tests.architectures.families.test_all_families import recurrent_states
from tests.architectures.test_delta_rule_scan import Look
from tests.cases import logits_of, token_batch
from tests.delta_rule_models import KIMI_CONFIGS, tiny_kimi_delta, tiny_seeing_model
from tests.training.test_callback import Rows, make_trainer
from tests.training.test_resume import SAVES, StopAt

HEADS, N, KEPT, HALF = 2, 8, 3, 4
FAMILIES = (*KIMI_CONFIGS, "glm5_next")
every_family = pytest.mark.parametrize("family", FAMILIES)
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(family: str, **settings) -> nn.Module:
    return tiny_seeing_model(family) if family == "glm5_next" else tiny_kimi_delta(family, **settings)


def unwritten(family: str) -> tuple[nn.Module, list[Truncation]]:
    """A model in which nothing writes to all channels but random ones, which are others in each head; and their cut."""
    model, generator, truncations = build(family), torch.Generator().manual_seed(3), []
    for layer in find_layers(model):
        kept = torch.stack([torch.randperm(N, generator=generator)[:KEPT].sort().values for _ in range(HEADS)])
        rows = torch.tensor([head * N + n for head in range(HEADS) for n in range(N) if n not in kept[head].tolist()])
        with torch.no_grad():
            layer.module.k_proj.weight[rows] = 0
        truncations.append(Truncation.from_indices(kept, N))
    return model, truncations


def cut_with(model: nn.Module, truncations: list[Truncation]) -> ModelChange:
    layers = find_layers(model)
    change = ModelChange(model, [layer.reduce(one) for layer, one in zip(layers, truncations)])
    change.commit()
    return change


def halved(model: nn.Module, **settings) -> nn.Module:
    record = compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", **settings), progress=False)
    assert record.outcome == "cut", record.reason
    return model.eval()


@every_family
def test_layers_are_found_and_nothing_else_is_named(family: str) -> None:
    model = build(family)
    layers = find_layers(model)
    assert [(layer.family, layer.form, type(layer).__mro__[1]) for layer in layers] == [
        (family, StateForm(N, N), KimiDeltaLayer)
    ] * 2
    assert unsupported_note(model, layers) is None
    assert all(change.value == N for change in config_changes(layers, {}))


@every_family
@pytest.mark.parametrize("use_cache", [False, True])
def test_cutting_channels_that_hold_nothing_changes_nothing(family: str, use_cache: bool) -> None:
    model, truncations = unwritten(family)
    batch = {**token_batch(), "use_cache": use_cache}
    before = logits_of(model, batch)
    cut_with(model, truncations)
    assert [layer.form for layer in find_layers(model)] == [(KEPT, N)] * 2
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("reductor", ["auto", "selection"])
def test_the_channels_that_hold_something_are_found(family: str, reductor: str) -> None:
    model, truncations = unwritten(family)
    before = logits_of(model, token_batch())
    config = CompreSSMConfig(strategy="target", target_state_size=KEPT, reductor=reductor)
    record = compress(model, [token_batch()], config, progress=False)
    assert record.outcome == "cut" and record.layers[0].lost_energy < 1e-9
    for layer, truncation in zip(find_layers(model), truncations):
        assert torch.equal(layer.module.input_mixing.double(), truncation.W)
    torch.testing.assert_close(logits_of(model, token_batch()), before, rtol=1e-3, atol=1e-4)


@every_family
def test_gradients_stay_but_those_of_what_is_gone(family: str) -> None:
    """Nothing writes to a cut channel any more; what would have changed that were its rows of `k_proj`."""
    model, truncations = unwritten(family)
    model.train()
    model(**token_batch(), use_cache=False).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cut_with(model, truncations)
    model(**token_batch(), use_cache=False).loss.backward()
    silent = {f"{layer.name}.k_proj.weight": layer.module.k_proj.weight == 0 for layer in find_layers(model)}
    for name, parameter in model.named_parameters():
        if name.endswith("mixing"):
            assert parameter.grad.abs().max() > 0
        elif parameter.grad is not None:
            expected = before[name].masked_fill(silent.get(name, torch.tensor(False)), 0.0)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=f"{name}")


@every_family
def test_generation_goes_on_as_before_with_a_smaller_cache(family: str) -> None:
    model, truncations = unwritten(family)
    prompt = token_batch()["input_ids"][:2, :7]
    expected, states = model.generate(prompt, **GENERATION), recurrent_states(model, prompt)
    cut_with(model, truncations)
    for settings in (GENERATION, {**GENERATION, "use_cache": False}):
        assert torch.equal(model.generate(prompt, **settings), expected)
    smaller = recurrent_states(model, prompt)
    assert [state.shape for state in states] == [(2, HEADS, N, N)] * 2
    assert [state.shape for state in smaller] == [(2, HEADS, KEPT, N)] * 2


@every_family
def test_the_queries_read_what_the_dropped_channels_held(family: str) -> None:
    """A channel that does what another does is cut, and T reads it twice; only its erasing is gone."""
    model = halved(build(family), fit_readout=False)
    for layer in find_layers(model):
        W, T = (M.double() for M in (layer.module.input_mixing.detach(), layer.module.readout_mixing.detach()))
        assert bool(((W == 0) | (W == 1)).all()) and bool((W.sum(1) == 1).all())
        torch.testing.assert_close(W.mT @ T, torch.eye(HALF, dtype=torch.float64).expand(HEADS, -1, -1))
        assert float((T - W).abs().max()) > 1e-3, "T is more than a selection"


@every_family
@pytest.mark.parametrize("settings", [{"stock": True}, {"stock": True, "reductor": "selection"}], ids=str)
def test_stock_is_refused_with_the_reason(family: str, settings: dict) -> None:
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    message = f"a {family} layer. cannot be cut in a stock model class: one `linear_head_dim` sizes its keys, queries"
    with pytest.raises(UnsupportedModelError, match=message):
        compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", **settings), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_of_a_users_own_class_is_refused_with_the_reason() -> None:
    base = type(build("kimi_linear"))
    own = type("OwnLanguageModel", (base,), {"__module__": __name__})
    model = build("kimi_linear")
    model.__class__ = own
    with pytest.raises(UnsupportedModelError, match="in a model of transformers' own class"):
        halved(model)


@every_family
def test_what_mixes_channels_is_refused(family: str) -> None:
    model = build(family)
    layer = find_layers(model)[0]
    basis = torch.linalg.qr(torch.randn(HEADS, N, HALF, dtype=torch.float64)).Q
    with pytest.raises(TruncationError, match=f"mixes states, which {layer.name} .a {family} layer"):
        layer.reduce(Truncation(T=basis, W=basis.clone()))
    with pytest.raises(DimensionError, match=f"is for 5 states; {layer.name} has 8"):
        layer.reduce(Truncation.from_indices(torch.tensor([1]), 5))
    with pytest.raises(UnsupportedModelError, match="'balanced' gives; choose one of interpolative, selection"):
        halved(model, reductor="balanced")


@every_family
def test_a_cut_to_full_size_changes_nothing(family: str) -> None:
    model = build(family)
    classes, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    cut_with(model, [Truncation.from_indices(torch.arange(N).expand(HEADS, -1), N)] * 2)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@every_family
def test_the_gramians_are_those_of_a_plain_loop(family: str) -> None:
    """P from the states, Q from the gradients that autograd has of them, one pair a head."""
    model, look = build(family), Look()
    layer = find_layers(model)[0]
    with layer.observed(look):
        logits_of(model, {**token_batch(), "use_cache": False})
    inputs, output = look.seen[0]
    assert inputs.log_decay.shape == inputs.B.shape == (4, 20, HEADS, N)
    u, g, beta, k, q = (x.detach().double() for x in (inputs.u, inputs.log_decay, inputs.beta, inputs.B, inputs.C))
    state, states, outputs = torch.zeros(4, HEADS, N, N, dtype=torch.float64, requires_grad=True), [], []
    for t in range(20):
        state = g[:, t].exp()[..., None] * state
        delta = beta[:, t, :, None] * (u[:, t] - torch.einsum("bhnv,bhn->bhv", state, k[:, t]))
        state = state + torch.einsum("bhn,bhv->bhnv", k[:, t], delta)
        state.retain_grad()
        states.append(state)
        outputs.append(torch.einsum("bhnv,bhn->bhv", state, q[:, t]))
    found = torch.stack(outputs, 1)
    torch.testing.assert_close(output.detach().double(), found.detach(), rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weights * found).sum().backward()
    times = torch.arange(20).expand(4, -1)
    measured = inputs.detached().state_gramian(times)[0], inputs.detached().adjoint_gramian(weights.float(), times)
    for gramian, rows in zip(measured, (states, [state.grad for state in states])):
        expected = sum(torch.einsum("bhnv,bhmv->hnm", row.detach(), row.detach()) for row in rows)
        torch.testing.assert_close(gramian, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@every_family
def test_an_observed_layer_computes_what_it_computes_unobserved(family: str) -> None:
    model, batch = halved(build(family)), {**token_batch(), "use_cache": False}
    before, look = logits_of(model, batch), Look()
    with find_layers(model)[0].observed(look):
        torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-5, atol=1e-5)
    assert look.seen[0][0].B.shape == (4, 20, HEADS, HALF), "what is observed is the smaller rule"
    with fast_cpu_scan():
        torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)


@every_family
def test_padding_is_left_out(family: str) -> None:
    """With a mask, the calibration sees what it sees of the rows without their padding."""
    model = build(family)
    layer, batch = find_layers(model)[0], token_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :8] = 0
    batch["labels"][0, :8] = -100
    gramians = calibrate(model, [layer], [{**batch, "attention_mask": mask}], progress=False).gramians[layer.name]
    assert gramians.P.shape == gramians.Q.shape == (HEADS, N, N)
    assert float(torch.linalg.eigvalsh(gramians.P).min()) > -1e-9
    halved(model)
    assert logits_of(model, {**batch, "attention_mask": mask})[1:].isfinite().all()


@every_family
def test_sizes_of_their_own_analyze_and_white_noise(family: str, tmp_path) -> None:
    model, _ = unwritten(family)
    with torch.no_grad():
        find_layers(model)[1].module.k_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    table = str(analyze(model, [token_batch()]))
    assert all(layer.name in table for layer in find_layers(model))
    config = CompreSSMConfig(tolerance=1e-4, uniform=False, allow_growth=True)
    assert compress(model, [token_batch()], config, progress=False).outcome == "cut"
    sizes = [layer.state_size for layer in find_layers(model)]
    assert sizes[0] <= KEPT < sizes[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert [layer.form for layer in find_layers(again)] == [layer.form for layer in find_layers(model)]
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()), rtol=1e-5, atol=1e-5)
    halved(build(family), gramians="white_noise")
    with pytest.raises(CalibrationError, match="no means over time"):
        halved(build(family), gramians="averaged")


def test_a_table_of_sizes_times_the_mixed_form(caplog) -> None:
    spectrum = analyze(build("kimi_linear"), [token_batch(), token_batch(seed=1)], sizes=[2, HALF])
    assert "4" in spectrum.size_table()


def test_a_layer_takes_forms_and_no_other_projections() -> None:
    layer = find_layers(build("kimi_linear"))[0]
    layer.take_form(StateForm(5, N))
    assert layer.form == (5, N) and layer.module.input_mixing.isnan().all()
    layer.take_form(StateForm(3, N))
    assert layer.module.readout_mixing.shape == (HEADS, N, 3)
    layer.take_form(StateForm(N, N))
    assert not layer.is_mixed and type(layer.module).__name__ == "KimiLinearDeltaAttention"
    with pytest.raises(DimensionError, match="projects keys to 8 entries and what is loaded to 16; build the model"):
        layer.take_form(StateForm(4, 16))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bailing_hybrid"])
def test_a_size_that_overrides_another_in_the_config_follows(family: str, tmp_path) -> None:
    """As original checkpoints have it; the stock class must not load what it cannot compute."""
    original = {"linear_attn_config": {"head_dim": N, "num_heads": HEADS, "short_conv_kernel_size": 4}}
    if family == "glm5_next":
        config = build(family).config
        torch.manual_seed(0)
        config.text_config = type(config.text_config)(**{**config.text_config.to_dict(), **original})
        model = type(build(family))(config).eval()
    else:
        model = build(family, **original)
    stock = type(model)
    halved(model).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written = written.get("text_config", written)
    assert written["linear_head_dim"] == written["linear_attn_config"]["head_dim"] == HALF
    again = type(model).from_pretrained(tmp_path).eval()
    text = getattr(again.config, "text_config", again.config)
    assert text.linear_head_dim == text.linear_attn_config["head_dim"] == N
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        stock.from_pretrained(tmp_path)


def test_adapters_may_hold_the_projections() -> None:
    """A mixed layer leaves them as they are."""
    model = build("kimi_linear")
    layer = find_layers(model)[0]
    layer.module.q_proj = Adapted(layer.module.q_proj)
    assert find_layers(model)[0].form == (N, N)
    halved(model)
    assert [layer.state_size for layer in find_layers(model)] == [HALF] * 2


class Adapted(nn.Module):
    """A projection in an adapter, which shows its weight as peft's do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features = base, base.in_features

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden)


def test_a_cut_while_a_trainer_trains_is_said_once(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        trainer = make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), build("kimi_linear"), Rows(token_batch(batch=64)))
        trainer.train()
    assert [layer.form for layer in find_layers(trainer.model)] == [(2, N)] * 2
    assert "no family supports" not in caplog.text


TWO_CUTS = CompreSSMConfig(strategy="fixed", window=(0.0, 0.5), interval=5)


@pytest.mark.parametrize("family, stop", [("kimi_linear", 7), (FAMILIES[-2], 12)])
def test_a_run_is_cut_twice_and_resumes(family: str, stop: int, tmp_path) -> None:
    rows, found = Rows(token_batch(batch=64)), []
    for name, stops in (("whole", []), ("parts", [StopAt(stop)])):
        settings = {**SAVES, "save_steps": stop}
        model = build(family)
        trainer = make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, stops, **settings)
        trainer.train()
        if stops:
            model = build(family)
            trainer = make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, [], **settings)
            trainer.train(resume_from_checkpoint=True)
        assert [layer.form for layer in find_layers(model)] == [(2, N)] * 2
        found.append(model.state_dict())
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
