"""Selective layers fitted after a cut to what they gave before it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression.measure import mixer_fit
from hf_compressm.compression.measure.mixer_fit import MixerFit
from hf_compressm.compression.processes import SingleProcess
from tests.cases import tiny_mamba, token_batch
from tests.delta_rule_models import tiny_gated_delta_net, tiny_kimi_delta
from tests.lightning_models import tiny_minimax
from tests.selective_models import tiny_falcon_h1, tiny_falcon_mamba, tiny_jamba, tiny_mamba2, tiny_zamba

BUILDERS = {
    "mamba": tiny_mamba,
    "zamba": tiny_zamba,
    "falcon_mamba": tiny_falcon_mamba,
    "jamba": tiny_jamba,
    "mamba2": tiny_mamba2,
    "falcon_h1": tiny_falcon_h1,
    "gated_delta_net": partial(tiny_gated_delta_net, "qwen3_next"),
    "kimi_delta": partial(tiny_kimi_delta, "kimi_linear"),
    "minimax": tiny_minimax,
}
every_family = pytest.mark.parametrize("family", BUILDERS)
FITTED_NAMES = ("mixing", "x_proj.weight", "x_proj_weight")


def batches(number: int = 2) -> list[dict[str, Tensor]]:
    return [token_batch(12, 20, seed=seed) for seed in range(number)]


def layer_outputs(model: nn.Module, given: list[dict]) -> dict[str, Tensor]:
    """What the modules of the layers give, by name."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in find_layers(model)}

    def keep(name: str):
        return lambda module, args, output: found[name].append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.module.register_forward_hook(keep(layer.name)) for layer in find_layers(model)]
    with torch.no_grad():
        for batch in given:
            model.eval()(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs) for name, outputs in found.items()}


def cut(model: nn.Module, given: list[dict], monkeypatch: pytest.MonkeyPatch, fits: bool, **settings) -> nn.Module:
    """Cut to half of the states, with all of the fit or without that of the layers' outputs."""
    half = find_layers(model)[0].state_size // 2
    with monkeypatch.context() as patch:
        # The loss of a model that has learned nothing says nothing of a fit.
        patch.setattr(MixerFit, "_is_nearer", lambda self, loss, before: True)
        if not fits:
            patch.setattr(MixerFit, "fit", lambda self, names: set())
        record = compress(model, given, CompreSSMConfig(state_size=half, **settings), progress=False)
    assert record.outcome == "cut"
    return model.eval()


@every_family
def test_the_first_layer_gives_nearly_what_it_gave_and_nothing_else_is_moved(family: str, monkeypatch) -> None:
    model, given = BUILDERS[family](), batches()
    wanted = layer_outputs(model, given)
    plain, fitted = (cut(copy.deepcopy(model), given, monkeypatch, fits) for fits in (False, True))
    # The inputs of the first layer are the same in all three models.
    name = find_layers(model)[0].name
    errors = [float((layer_outputs(each, given)[name] - wanted[name]).square().sum()) for each in (plain, fitted)]
    assert errors[1] < 0.95 * errors[0]
    moved = {
        name for (name, one), other in zip(plain.named_parameters(), fitted.parameters()) if not torch.equal(one, other)
    }
    assert moved and all(name.endswith(FITTED_NAMES) for name in moved)
    assert plain.config.to_dict() == fitted.config.to_dict()


def test_the_rows_of_the_time_step_stay(monkeypatch) -> None:
    for build, name, rank in ((tiny_mamba, "x_proj.weight", 4), (tiny_zamba, "x_proj_weight", 3)):
        model, given = build(), batches()
        rank = getattr(find_layers(model)[0].module, "time_step_rank", rank)
        plain, fitted = (cut(copy.deepcopy(model), given, monkeypatch, fits) for fits in (False, True))
        differs = []
        for one, other in zip(find_layers(plain), find_layers(fitted)):
            a, b = (layer.module.get_parameter(name).movedim(-2, 0) for layer in (one, other))
            assert torch.equal(a[:rank], b[:rank])
            differs.append(not torch.equal(a[rank:], b[rank:]))
        assert any(differs)


class TwinProcess(SingleProcess):
    """As if another process saw the same."""

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@pytest.mark.parametrize("processes", [SingleProcess, TwinProcess])
@pytest.mark.parametrize("labelled", [True, False])
def test_matrices_that_were_right_are_found_again(processes, labelled: bool) -> None:
    model, given = tiny_mamba2().eval(), batches(1)
    cut_model = compress(model, given, CompreSSMConfig(state_size=4), progress=False)
    assert cut_model.outcome == "cut"
    if not labelled:
        given = [{"input_ids": batch["input_ids"]} for batch in given]
    wanted, layers = layer_outputs(model, given), find_layers(model)
    for parameter in model.parameters():
        # Of a frozen model too an error counts by the loss's gradient.
        parameter.requires_grad_(False)
    fit = MixerFit(layers, model, given, None, processes(), seed=0)
    fit.remember_outputs()
    with torch.no_grad():
        for layer in layers:
            layer.module.readout_mixing.mul_(0.7)
    worse = layer_outputs(model, given)
    assert fit.fit([layer.name for layer in layers]) == {layer.name for layer in layers}
    mended = layer_outputs(model, given)
    for name, right in wanted.items():
        assert (mended[name] - right).square().sum() < 0.01 * (worse[name] - right).square().sum()


def test_matrices_that_raise_the_loss_are_not_kept(monkeypatch) -> None:
    plain = cut(tiny_mamba(), batches(), monkeypatch, fits=False)
    monkeypatch.setattr(mixer_fit, "descend", lambda judge, start, roots: [1e20 * M for M in start])
    model = tiny_mamba()
    half = CompreSSMConfig(state_size=find_layers(model)[0].state_size // 2)
    assert compress(model, batches(), half, progress=False).outcome == "cut"
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), model.parameters()))


class Twice(nn.Module):
    """Runs its layers once, and from the fifth pass on twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.passes = body, 0

    def forward(self, **batch: Tensor):
        self.passes += 1
        if self.passes > 4:
            self.body(**batch)
        return self.body(**batch)


def test_layers_that_run_otherwise_than_before_stay_as_they_are(monkeypatch) -> None:
    plain = cut(tiny_mamba2(), batches(1), monkeypatch, fits=False)
    model = Twice(tiny_mamba2())
    compress(model, batches(1), CompreSSMConfig(state_size=4), progress=False)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), model.body.parameters()))


def test_a_model_in_half_precision_is_fitted_in_single(monkeypatch) -> None:
    model, given = tiny_falcon_h1().to(torch.bfloat16), [token_batch(48, 20, seed=seed) for seed in range(2)]
    wanted = layer_outputs(model, given)
    plain, fitted = (cut(copy.deepcopy(model), given, monkeypatch, fits) for fits in (False, True))
    name = find_layers(model)[0].name
    errors = [(layer_outputs(each, given)[name] - wanted[name]).float().square().sum() for each in (plain, fitted)]
    assert errors[1] < 0.9 * errors[0]
    assert {parameter.dtype for parameter in fitted.parameters()} == {torch.bfloat16}


def test_a_layer_that_mixes_already_and_one_that_gives_rows_up_are_fitted(monkeypatch) -> None:
    model, given = tiny_falcon_h1(), [token_batch(48, 20, seed=seed) for seed in range(2)]
    compress(model, given, CompreSSMConfig(state_size=6), progress=False)
    wanted, name = layer_outputs(model, given), find_layers(model)[0].name
    for settings in ({}, {"projection_rows": 5}):
        errors = []
        for fits in (False, True):
            smaller = cut(copy.deepcopy(model), given, monkeypatch, fits, **settings)
            errors.append(float((layer_outputs(smaller, given)[name] - wanted[name]).square().sum()))
        assert errors[1] < 0.9 * errors[0], settings


def test_few_sequences_of_many_are_run_again(monkeypatch) -> None:
    monkeypatch.setattr(mixer_fit, "_STEPS", 100)
    model, given = tiny_mamba2(), batches(1)
    fit = MixerFit(find_layers(model), model, given, None, SingleProcess(), seed=0)
    fit.remember_outputs()
    for wanted in fit._wanted.values():
        assert [len(part.sequences) for part in wanted] == [5]
        assert wanted[0].held_out.any(1).sum() == 1 and wanted[0].shape[0] == 12


def test_sequences_with_padding_are_cut_to_the_chosen_ones(monkeypatch) -> None:
    monkeypatch.setattr(mixer_fit, "_STEPS", 640)
    given = [token_batch(48, 20)]
    mask = torch.ones(48, 20, dtype=torch.long)
    mask[::2, :7] = 0
    given[0]["attention_mask"] = mask
    plain, fitted = (cut(tiny_falcon_h1(), given, monkeypatch, fits) for fits in (False, True))
    assert not torch.equal(find_layers(plain)[0].module.readout_mixing, find_layers(fitted)[0].module.readout_mixing)
