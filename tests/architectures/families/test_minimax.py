"""Lightning attention: keys and queries of fewer entries, in a recurrence that every combination leaves as it is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import StateForm, config_changes, find_layers, unsupported_note
from hf_compressm.compression import ModelChange, calibrate
from hf_compressm.errors import DimensionError, UnsupportedModelError
from hf_compressm.systems import Truncation
from tests.architectures.families.test_all_families import recurrent_states
from tests.architectures.families.test_kimi_delta import Adapted
from tests.architectures.test_delta_rule_scan import Look
from tests.cases import logits_of, token_batch
from tests.lightning_models import HEADS, KEY_DIM, tiny_minimax
from tests.training.test_callback import Rows, make_trainer

N, KEPT, HALF, LENGTH = KEY_DIM, 3, 4, 20
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def redundant(**settings) -> tuple[nn.Module, list[Truncation]]:
    """A model whose keys are, in each head, multiples of KEPT of them; and oblique pairs of matrices that know it."""
    # Positive factors go through a rectifier.
    model = tiny_minimax(hidden_act="relu", **settings)
    generator, truncations = torch.Generator().manual_seed(3), []
    for layer in find_layers(model):
        factors = torch.rand(HEADS, N, KEPT, generator=generator)
        for head in range(HEADS):
            kept = torch.randperm(N, generator=generator)[:KEPT]
            owner = torch.randint(0, KEPT, (N,), generator=generator)
            owner[kept] = torch.arange(KEPT)
            factors[head] *= nn.functional.one_hot(owner, KEPT)
            with torch.no_grad():
                keys = layer.module.qkv_proj.weight.unflatten(0, (HEADS, 3, N))[head, 1]
                keys.copy_(factors[head] @ keys[kept])
        # The states lie in the range of T; W is any matrix that reads the coordinates there.
        T = factors.double() @ torch.randn(HEADS, KEPT, KEPT, dtype=torch.float64, generator=generator)
        weights = torch.rand(HEADS, N, 1, dtype=torch.float64, generator=generator) + 0.5
        W = (weights * T) @ torch.linalg.inv(T.mT @ (weights * T))
        truncations.append(Truncation(T=T, W=W))
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


def test_layers_are_found_and_attention_and_experts_are_left_alone() -> None:
    model = tiny_minimax()
    layers = find_layers(model)
    assert [(layer.name, layer.family, layer.form) for layer in layers] == [
        (f"model.layers.{number}.self_attn", "minimax", StateForm(N, N)) for number in (0, 1)
    ]
    assert unsupported_note(model, layers) is None
    assert all(change.value == N for change in config_changes(layers, {}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    halved(model)
    after = model.state_dict()
    assert {name for name in after if name not in before} == {
        f"{layer.name}.{name}_mixing" for layer in layers for name in ("input", "readout")
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_cutting_what_is_redundant_changes_nothing(use_cache: bool, padded: bool) -> None:
    model, truncations = redundant()
    batch = {**token_batch(), "use_cache": use_cache}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :7] = 0
        batch["attention_mask"][1, 12:] = 0
    before = logits_of(model, batch)
    cut_with(model, truncations)
    assert [layer.form for layer in find_layers(model)] == [(KEPT, N)] * 2
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reductor", ["auto", "interpolative"])
def test_what_is_redundant_is_found(reductor: str) -> None:
    """The balanced pair is oblique, and nothing of the output is lost."""
    model, _ = redundant()
    before = logits_of(model, token_batch())
    config = CompreSSMConfig(strategy="target", target_state_size=KEPT, reductor=reductor)
    record = compress(model, [token_batch()], config, progress=False)
    assert record.outcome == "cut" and record.layers[0].lost_energy < 1e-9
    for layer in find_layers(model):
        W, T = (matrix.detach().double() for matrix in (layer.module.input_mixing, layer.module.readout_mixing))
        torch.testing.assert_close(
            W.mT @ T, torch.eye(KEPT, dtype=torch.float64).expand(HEADS, -1, -1), rtol=1e-3, atol=1e-3
        )
        assert float((W - T).abs().max()) > 1e-2
    torch.testing.assert_close(logits_of(model, token_batch()), before, rtol=1e-3, atol=1e-4)


def test_gradients_stay_where_the_cut_changes_nothing() -> None:
    """All but those of the keys, which now pass W and see only what the cut states hold."""
    model, truncations = redundant()
    model.train()
    model(**token_batch(), use_cache=False).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cut_with(model, truncations)
    model(**token_batch(), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("mixing"):
            assert parameter.grad.abs().max() > 0
        elif name.endswith("qkv_proj.weight"):
            found, expected = (x.unflatten(0, (HEADS, 3, N))[:, ::2] for x in (parameter.grad, before[name]))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)
        elif parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, before[name], rtol=1e-3, atol=1e-5, msg=name)


def test_generation_goes_on_as_before_with_a_smaller_cache() -> None:
    model, truncations = redundant()
    # Without 0, which would be taken for padding.
    prompt = token_batch()["input_ids"][:2, :7].clamp(min=1)
    expected, states = model.generate(prompt, **GENERATION), recurrent_states(model, prompt)
    cut_with(model, truncations)
    for settings in (GENERATION, {**GENERATION, "use_cache": False}):
        assert torch.equal(model.generate(prompt, **settings), expected)
    smaller = recurrent_states(model, prompt)
    assert [state.shape for state in states] == [(2, HEADS, N, N)] * 2
    assert [state.shape for state in smaller] == [(2, HEADS, KEPT, N)] * 2
    beams = {**GENERATION, "num_beams": 2}
    assert model.generate(prompt, **beams).shape == (2, 13)


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_observed_is_the_recurrence(mixed: bool) -> None:
    """A plain loop over its steps gives the output that was seen, and what is seen changes nothing."""
    model, look, batch = tiny_minimax(), Look(), {**token_batch(), "use_cache": False}
    if mixed:
        halved(model)
    before, layer = logits_of(model, batch), find_layers(model)[0]
    with layer.observed(look):
        assert torch.equal(logits_of(model, batch), before)
    logits_of(model, batch)
    [(inputs, output)] = look.seen
    assert inputs.B.shape == inputs.C.shape == (4, LENGTH, HEADS, HALF if mixed else N)
    decay = inputs.A.double().exp()[:, None, None]
    state = torch.zeros(4, HEADS, inputs.B.shape[-1], N, dtype=torch.float64)
    for t in range(LENGTH):
        k, v, q = (x[:, t].double() for x in (inputs.B, inputs.u, inputs.C))
        state = decay * state + k[..., None] * v[..., None, :]
        expected = torch.einsum("bhnv,bhn->bhv", state, q)
        torch.testing.assert_close(output[:, t].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_gramians_are_those_of_a_plain_loop() -> None:
    """P from the states, Q from the gradients that autograd has of them, one pair a head."""
    model, look = tiny_minimax(), Look()
    with find_layers(model)[1].observed(look):
        logits_of(model, {**token_batch(), "use_cache": False})
    [(inputs, output)] = look.seen
    v, k, q, decay = (x.detach().double() for x in (inputs.u, inputs.B, inputs.C, inputs.A.exp()))
    state, states, outputs = torch.zeros(4, HEADS, N, N, dtype=torch.float64, requires_grad=True), [], []
    for t in range(LENGTH):
        state = decay[:, None, None] * state + torch.einsum("bhn,bhv->bhnv", k[:, t], v[:, t])
        state.retain_grad()
        states.append(state)
        outputs.append(torch.einsum("bhnv,bhn->bhv", state, q[:, t]))
    found = torch.stack(outputs, 1)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weights * found).sum().backward()
    times = torch.arange(LENGTH).expand(4, -1)
    measured = inputs.detached().state_gramian(times)[0], inputs.detached().adjoint_gramian(weights.float(), times)
    for gramian, rows in zip(measured, (states, [state.grad for state in states])):
        expected = sum(torch.einsum("bhnv,bhmv->hnm", row.detach(), row.detach()) for row in rows)
        torch.testing.assert_close(gramian, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_loss_reaches_the_gramians_through_checkpointed_layers() -> None:
    model = tiny_minimax().train()
    layer = find_layers(model)[0]
    plain = calibrate(model, [layer], [token_batch()], progress=False).gramians[layer.name]
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = calibrate(model, [layer], [token_batch()], progress=False).gramians[layer.name]
    assert plain.P.shape == plain.Q.shape == (HEADS, N, N)
    torch.testing.assert_close(again.Q, plain.Q, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("settings", [{"stock": True}, {"stock": True, "reductor": "selection"}], ids=str)
def test_stock_is_refused_with_the_reason(settings: dict) -> None:
    model = tiny_minimax()
    before = copy.deepcopy(model.state_dict())
    message = "a minimax layer. cannot be cut in a stock model class: one `head_dim` sizes its keys, queries and values"
    with pytest.raises(UnsupportedModelError, match=message):
        compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", **settings), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_truncations_of_another_size_are_refused_and_one_of_the_full_size_changes_nothing() -> None:
    model = tiny_minimax()
    layer = find_layers(model)[0]
    with pytest.raises(DimensionError, match=f"is for 5 states; {layer.name} has 8"):
        layer.reduce(Truncation.from_indices(torch.tensor([1]), 5))
    classes, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    T = torch.randn(HEADS, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cut_with(model, [Truncation(T=T, W=torch.linalg.inv(T).mT)] * 2)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gramians", ["white_noise", "averaged"])
def test_other_gramians(gramians: str) -> None:
    assert [layer.form for layer in find_layers(halved(tiny_minimax(), gramians=gramians))] == [(HALF, N)] * 2


def test_sizes_of_their_own_and_analyze(tmp_path) -> None:
    model, _ = redundant()
    with torch.no_grad():
        find_layers(model)[1].module.qkv_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    spectrum = analyze(model, [token_batch(), token_batch(seed=1)], sizes=[2, HALF])
    assert all(layer.name in str(spectrum) for layer in find_layers(model)) and "4" in spectrum.size_table()
    config = CompreSSMConfig(strategy="tolerance", tolerance=1e-3, uniform=False, allow_growth=True)
    assert compress(model, [token_batch()], config, progress=False).outcome == "cut"
    sizes = [layer.state_size for layer in find_layers(model)]
    assert sizes[0] <= KEPT < sizes[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert [layer.form for layer in find_layers(again)] == [layer.form for layer in find_layers(model)]
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()), rtol=1e-5, atol=1e-5)


def test_a_head_size_that_follows_from_the_width_is_kept(tmp_path) -> None:
    """`head_dim` is optional in the config; a compressed one has it, for a stock class must not load the folder."""
    model = halved(tiny_minimax(head_dim=None))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert [layer.form for layer in find_layers(again)] == [(HALF, N)] * 2
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(tiny_minimax()).from_pretrained(tmp_path)


def test_a_layer_takes_forms_and_no_other_projections() -> None:
    layer = find_layers(tiny_minimax())[0]
    layer.take_form(StateForm(5, N))
    assert layer.form == (5, N) and layer.module.input_mixing.isnan().all()
    layer.take_form(StateForm(N, N))
    assert not layer.is_mixed and type(layer.module).__name__ == "MiniMaxLightningAttention"
    wider = tiny_minimax(16)
    assert layer.saved_form(wider.state_dict(), f"{layer.name}.") == (16, 16)
    with pytest.raises(DimensionError, match="projects keys to 8 entries and what is loaded to 16; build the model"):
        layer.take_form(StateForm(HALF, 16))


def test_an_adapter_may_hold_the_projection() -> None:
    """A mixed layer leaves it as it is, and what it gives is what is watched."""
    model = tiny_minimax()
    for layer in find_layers(model):
        layer.module.qkv_proj = Adapted(layer.module.qkv_proj)
    halved(model)
    assert [layer.form for layer in find_layers(model)] == [(HALF, N)] * 2


def test_attention_maps_are_given_as_before() -> None:
    """transformers collects them by the class of the layers; for lightning attention they are its last states."""
    model, inputs = tiny_minimax(), token_batch()["input_ids"]
    shapes = [x.shape for x in model(inputs, output_attentions=True, use_cache=False).attentions or ()]
    halved(model)
    found = [x.shape for x in model(inputs, output_attentions=True, use_cache=False).attentions or ()]
    assert shapes[:2] == [(4, HEADS, N, N)] * 2 and found == [(4, HEADS, HALF, N)] * 2 + shapes[2:]


def test_a_cut_while_a_trainer_trains_names_no_other_layers(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_compressm"):
        trainer = make_trainer(
            tmp_path,
            CompreSSMCallback(CompreSSMConfig(strategy="fixed", window=(0.0, 0.5), interval=5)),
            tiny_minimax(),
            Rows(token_batch(batch=64)),
        )
        trainer.train()
    assert [layer.form for layer in find_layers(trainer.model)] == [(2, N)] * 2
    assert "no family supports" not in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_nothing_grows_whatever_training_does_to_the_matrices(scale: float) -> None:
    """A state without input only decays."""
    model = halved(tiny_minimax())
    mixer = find_layers(model)[0].module
    generator = torch.Generator().manual_seed(1)
    for matrix in (mixer.input_mixing, mixer.readout_mixing):
        matrix.copy_(scale * torch.randn(matrix.shape, generator=generator))
    start = torch.randn(1, HEADS, HALF, N, generator=generator)
    nothing = torch.zeros(1, HEADS, 4000, HALF), torch.zeros(1, HEADS, 4000, HALF), torch.zeros(1, HEADS, 4000, N)
    output, state = mixer._attend(*nothing, start)
    assert output.isfinite().all() and float(state.norm()) <= float(start.norm())
