"""Gated DeltaNet: grouped value heads, models that also see, configs, and the Gramians behind a cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3_5ForConditionalGeneration

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression import calibrate
from hf_compressm.errors import CalibrationError, TruncationError, UnsupportedModelError
from hf_compressm.systems import Truncation
from tests.cases import logits_of, token_batch
from tests.delta_rule_models import (
    GATED_CONFIGS,
    HEADS,
    KEY_HEADS,
    VALUE_DIM,
    tiny_gated_delta_net,
    tiny_seeing_model,
)
from tests.training.test_callback import Rows, make_trainer
from tests.training.test_resume import SAVES, StopAt

N, HALF = 8, 4
every_family = pytest.mark.parametrize("family", GATED_CONFIGS)


def halved(model, **settings):
    record = compress(model, [token_batch()], CompreSSMConfig(strategy="fixed", **settings), progress=False)
    assert record.outcome == "cut", record.reason
    return record


@every_family
def test_the_gramians_are_those_of_the_key_heads(family: str) -> None:
    model = tiny_gated_delta_net(family)
    layer = find_layers(model)[0]
    gramians = calibrate(model, [layer], [token_batch()], progress=False).gramians[layer.name]
    assert gramians.P.shape == gramians.Q.shape == (KEY_HEADS, N, N)
    assert layer.module.num_v_heads == HEADS and layer.module.head_v_dim == VALUE_DIM
    assert (
        float(torch.linalg.eigvalsh(gramians.P).min()) > -1e-9 and float(gramians.Q.diagonal(dim1=1, dim2=2).min()) > 0
    )


@every_family
def test_the_sizes_of_values_stay(family: str, tmp_path) -> None:
    """Also where a config takes the one of values from that of keys unless it says both."""
    model = tiny_gated_delta_net(family, state_size=N)
    halved(model, stock=True)
    assert model.config.linear_key_head_dim == HALF and model.config.linear_value_head_dim == VALUE_DIM
    model.save_pretrained(tmp_path)
    again = type(model.config).from_pretrained(tmp_path)
    assert again.linear_key_head_dim == HALF and again.linear_value_head_dim == VALUE_DIM


def test_a_model_whose_value_size_is_its_default_keeps_it(tmp_path) -> None:
    """Olmo Hybrid's default is twice the key size: what is saved must not follow the smaller one."""
    model = tiny_gated_delta_net("olmo_hybrid", linear_value_head_dim=None)
    assert model.config.linear_value_head_dim == 2 * N
    for stock, folder in ((True, tmp_path / "stock"), (False, tmp_path / "mixed")):
        model = tiny_gated_delta_net("olmo_hybrid", linear_value_head_dim=None)
        halved(model, stock=stock)
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        assert again.config.linear_value_head_dim == 2 * N
        torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()))


def test_with_stock_a_model_that_also_sees_keeps_its_class_and_its_text_config_follows(tmp_path) -> None:
    model = tiny_seeing_model("qwen3_5")
    halved(model, stock=True)
    assert type(model) is Qwen3_5ForConditionalGeneration
    assert model.config.text_config.linear_key_head_dim == model.model.language_model.config.linear_key_head_dim == HALF
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, token_batch()), logits_of(model, token_batch()))


@every_family
def test_layers_may_have_sizes_of_their_own(family: str, tmp_path) -> None:
    model = tiny_gated_delta_net(family)
    with torch.no_grad():
        layer = find_layers(model)[0]
        keep = torch.arange(3, N).expand(KEY_HEADS, -1)
        fixed = {"in_proj_qkvz.weight", "in_proj_qkv.weight", "q_proj.weight", "k_proj.weight", "conv1d.weight"}
        for axis, parameter in zip(layer.layout.axes, layer.state_parameters().values()):
            assert axis.parameter in fixed
            some, all_of_it = axis.kept(keep[:, :1], N).tolist(), axis.kept(keep, N).tolist()
            # What stays whatever is kept is in both.
            values = set(axis.kept(keep[:, 1:2], N).tolist()) & set(some)
            parameter[[entry for entry in all_of_it if entry not in values]] = 0
    halved_config = CompreSSMConfig(strategy="tolerance", tolerance=1e-3, uniform=False)
    assert compress(model, [token_batch()], halved_config, progress=False).outcome == "cut"
    sizes = [layer.state_size for layer in find_layers(model)]
    assert sizes[0] <= 3 < sizes[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert [layer.form for layer in find_layers(again)] == [layer.form for layer in find_layers(model)]
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()), rtol=1e-5, atol=1e-6)


def test_analyze_shows_the_spectrum_and_white_noise_measures_too() -> None:
    model = tiny_gated_delta_net("qwen3_next")
    table = str(analyze(model, [token_batch()]))
    assert all(layer.name in table for layer in find_layers(model))
    halved(model, gramians="white_noise")


def test_there_is_no_average_of_it() -> None:
    with pytest.raises(CalibrationError, match="no means over time"):
        halved(tiny_gated_delta_net("qwen3_5"), gramians="averaged")


def test_what_would_not_stay_stable_is_refused() -> None:
    model = tiny_gated_delta_net("qwen3_next")
    layer = find_layers(model)[0]
    T: Tensor = torch.eye(N, HALF, dtype=torch.float64).expand(KEY_HEADS, -1, -1)
    with pytest.raises(TruncationError, match="its state could grow"):
        layer.reduce(Truncation(T=T / 2, W=2 * T))
    for stock in (False, True):
        with pytest.raises(UnsupportedModelError, match="'balanced'"):
            halved(model, reductor="balanced", stock=stock)


TWO_CUTS = CompreSSMConfig(strategy="fixed", window=(0.0, 0.5), interval=5)


@pytest.mark.parametrize("family, stop", [("qwen3_next", 7), ("olmo_hybrid", 12)])
def test_a_run_is_cut_twice_and_resumes(family: str, stop: int, tmp_path) -> None:
    rows, found = Rows(token_batch(batch=64)), []
    for name, stops in (("whole", []), ("parts", [StopAt(stop)])):
        settings = {**SAVES, "save_steps": stop}
        model = tiny_gated_delta_net(family)
        trainer = make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, stops, **settings)
        trainer.train()
        if stops:
            model = tiny_gated_delta_net(family)
            trainer = make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, [], **settings)
            trainer.train(resume_from_checkpoint=True)
        assert [layer.form for layer in find_layers(model)] == [(2, N)] * 2
        found.append(model.state_dict())
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
