"""Models that also see take the mixed form in their text model: cut, run on pictures, saved, loaded, taken back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from hf_compressm import CompreSSMCallback, CompreSSMConfig, analyze, compress
from hf_compressm.architectures import find_layers
from hf_compressm.compression import Compressor
from hf_compressm.hub import load_model
from hf_compressm.models.compressed import compressed_config_class, compressed_model_class
from hf_compressm.models.compressed.mixing import mix
from tests.architectures.families.test_all_families import recurrent_states
from tests.cases import logits_of, token_batch
from tests.compression.cut.test_mixed_form import TAKEN_BACK, WorseBelow, assert_same, everything, trainer_groups
from tests.delta_rule_models import GATED_CONFIGS, SEEING_CONFIGS, tiny_seeing_model
from tests.models.test_remote_code import WITHOUT_THE_LIBRARY
from tests.training.test_callback import Rows, make_trainer
from tests.training.test_resume import SAVES, StopAt

N, HALF = 8, 4
HALVED = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
every_family = pytest.mark.parametrize("family", SEEING_CONFIGS)


def cut(family: str) -> nn.Module:
    model = tiny_seeing_model(family)
    record = compress(model, [token_batch()], HALVED, progress=False)
    assert record.outcome == "cut", record.reason
    return model.eval()


def prompt() -> Tensor:
    return token_batch()["input_ids"][:2, :7].clamp_min(1)


def names(family: str) -> tuple[str, str]:
    """The names of the size and of the compressed class."""
    kind = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe", "qwen4_exp": "Qwen4Exp", "glm5_next": "Glm5Next"}
    size = "linear_key_head_dim" if family in GATED_CONFIGS else "linear_head_dim"
    return size, f"Compressed{kind[family]}ForConditionalGeneration"


@every_family
def test_the_whole_model_takes_the_class_and_its_text_config_the_projected_size(family: str) -> None:
    model = cut(family)
    size, name = names(family)
    assert type(model).__name__ == name and [layer.form for layer in find_layers(model)] == [(HALF, N)] * 2
    assert model.config.state_sizes == [HALF] * 2 and model.config.projected_state_sizes == [N] * 2
    assert getattr(model.config.text_config, size) == N and model.config is model.model.config
    assert model.config.text_config is model.model.language_model.config
    assert not hasattr(model.config.text_config, "state_sizes")


@every_family
def test_it_loads_and_generates_what_it_did(family: str, tmp_path) -> None:
    model = cut(family)
    size, name = names(family)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [name] and written["text_config"][size] == HALF
    generated = model.generate(prompt(), **GENERATION)
    assert torch.equal(model.generate(prompt(), use_cache=False, **GENERATION), generated)
    for again in (AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), load_model(tmp_path)):
        assert type(again) is type(model) and getattr(again.config.text_config, size) == N
        torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()))
        assert torch.equal(again.generate(prompt(), **GENERATION), generated)
    assert type(model.config).from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["text_config"][size] == HALF


@every_family
def test_the_stock_class_refuses_the_folder(family: str, tmp_path) -> None:
    stock = type(tiny_seeing_model(family))
    cut(family).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        stock.from_pretrained(tmp_path)


@every_family
def test_nothing_is_lost_where_the_dropped_states_hold_nothing(family: str) -> None:
    model = tiny_seeing_model(family)
    with torch.no_grad():
        for layer in find_layers(model):
            silence(layer)
    before, generated = logits_of(model, token_batch()), model.generate(prompt(), **GENERATION)
    states = recurrent_states(model, prompt())
    assert compress(model, [token_batch()], HALVED, progress=False).outcome == "cut"
    model.eval()
    for use_cache in (False, True):
        found = logits_of(model, {**token_batch(), "use_cache": use_cache})
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.generate(prompt(), **GENERATION), generated)
    for one, other in zip(recurrent_states(model, prompt()), states, strict=True):
        assert one.shape == (*other.shape[:2], HALF, other.shape[3])


def silence(layer) -> None:
    """Let nothing write to every second channel."""
    for axis, parameter in zip(layer.stock_layout.axes, layer.state_parameters().values()):
        if axis.parameter == "k_proj.weight":
            parameter[1::2] = 0
        elif axis.parameter == "in_proj_qkv.weight":
            width = layer.key_heads * N
            parameter[width + 1 : 2 * width : 2] = 0


@every_family
def test_mixing_with_the_identity_is_the_stock_model_also_on_a_picture(family: str) -> None:
    model = tiny_seeing_model(family)
    inputs = with_a_picture(model) if family in ("qwen3_5", "qwen3_5_moe") else token_batch()
    mixed = copy.deepcopy(model)
    for layer in find_layers(mixed):
        mix(layer.module, N)
    torch.testing.assert_close(logits_of(mixed, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)


def with_a_picture(model: nn.Module) -> dict[str, Tensor]:
    """Four patches, which are one token of the text; the model's config gets its number."""
    vision, tokens = model.config.vision_config, token_batch()["input_ids"][:1]
    model.config.image_token_id = 5
    tokens = torch.where(tokens == 5, 6, tokens)
    tokens[0, 4] = 5
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(4, patch, generator=torch.Generator().manual_seed(0))
    kinds = (tokens == 5).int()
    return {
        "input_ids": tokens, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": kinds,
    }  # fmt: skip


def test_a_cut_model_sees() -> None:
    model = cut("qwen3_5")
    inputs = with_a_picture(model)
    seen = logits_of(model, inputs)
    other = logits_of(model, {**inputs, "pixel_values": -inputs["pixel_values"]})
    assert seen.isfinite().all() and torch.equal(seen[:, :4], other[:, :4])
    assert not torch.allclose(seen[:, 4:], other[:, 4:])


@every_family
def test_a_cut_that_is_taken_back_leaves_no_trace(family: str) -> None:
    model = tiny_seeing_model(family)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-2)
    for _ in range(2):
        model.train()
        model(**token_batch(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = everything(model, optimizer)
    compressor = Compressor(model, TAKEN_BACK, WorseBelow(N), optimizer=optimizer, progress=False)
    assert compressor.check([token_batch()]).outcome == "rolled_back"
    assert_same(everything(model, optimizer), before)
    assert Compressor(model, HALVED, optimizer=optimizer, progress=False).check([token_batch()]).outcome == "cut"
    rebuilt = [[id(parameter) for parameter in group["params"]] for group in trainer_groups(model)]
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == rebuilt


@every_family
def test_copies_sizes_and_a_second_cut(family: str) -> None:
    model = cut(family)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(
            logits_of(twin, token_batch()), logits_of(model, token_batch())
        )
    assert "layers.0" in str(analyze(model, [token_batch()]))
    assert compress(model, [token_batch()], HALVED, progress=False).outcome == "cut"
    assert [layer.form for layer in find_layers(model)] == [(2, N)] * 2 and model.config.state_sizes == [2, 2]


@every_family
def test_each_layer_may_have_a_size_of_its_own(family: str) -> None:
    stock = tiny_seeing_model(family)
    written = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config_class = compressed_config_class(type(stock.config))
    config = config_class(**written, state_sizes=[3, 8], projected_state_sizes=[N, N])
    model = compressed_model_class(type(stock))(config).eval()
    assert [layer.state_size for layer in find_layers(model)] == [3, 8]
    assert logits_of(model, token_batch()).isfinite().all()
    assert AutoConfig.for_model(config.model_type).__class__ is config_class


def test_projected_sizes_may_differ_where_the_family_has_such() -> None:
    stock = tiny_seeing_model("qwen3_5")
    written = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config = compressed_config_class(type(stock.config))(**written, state_sizes=[3, 4], projected_state_sizes=[6, N])
    model = compressed_model_class(type(stock))(config).eval()
    assert [layer.form for layer in find_layers(model)] == [(3, 6), (4, N)]
    assert logits_of(model, token_batch()).isfinite().all()


def test_the_model_without_a_head_and_the_text_model_alone(tmp_path) -> None:
    whole = tiny_seeing_model("qwen3_5")
    for part, name in (
        (whole.model, "CompressedQwen3_5Model"),
        (whole.model.language_model, "CompressedQwen3_5TextModel"),
    ):
        model = copy.deepcopy(part)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state.square().mean()

        assert compress(model, [token_batch()], HALVED, loss_function=loss, progress=False).outcome == "cut"
        assert type(model).__name__ == name
        model.eval().save_pretrained(tmp_path / name)
        again = transformers.AutoModel.from_pretrained(tmp_path / name).eval()
        assert type(again) is type(model)
        with torch.no_grad():
            found, expected = (each(input_ids=prompt()).last_hidden_state for each in (again, model))
        torch.testing.assert_close(found, expected)


WITH_THE_LIBRARY = """
import sys
import torch, transformers
import hf_compressm.models
for argument in sys.argv[1:]:
    folder, auto_class = argument.split("::")
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("hf_compressm")
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**saved["inputs"]).logits, saved["logits"], atol=1e-5, rtol=1e-5)
    found = model.generate(saved["inputs"]["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(found, saved["generated"])
    print(type(model).__name__)
"""


def test_a_fresh_process_loads_what_was_saved(tmp_path) -> None:
    arguments, expected = [], []
    for family in SEEING_CONFIGS:
        model, inputs = cut(family), {"input_ids": prompt()}
        model.save_pretrained(tmp_path / family)
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        saved = {"inputs": inputs, "logits": logits_of(model, inputs), "generated": generated}
        torch.save(saved, tmp_path / family / "expected.pt")
        arguments.append(f"{tmp_path / family}::AutoModelForImageTextToText")
        expected.append(type(model).__name__)
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for script in (WITH_THE_LIBRARY, WITHOUT_THE_LIBRARY):
        run = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == expected


TWO_CUTS = CompreSSMConfig(strategy="fixed", window=(0.0, 0.5), interval=5)


def test_a_run_is_cut_twice_and_resumes(tmp_path) -> None:
    rows, found = Rows(token_batch(batch=64)), []
    for name, stops in (("whole", []), ("parts", [StopAt(7)])):
        settings = {**SAVES, "save_steps": 7}
        model = tiny_seeing_model("qwen3_5")
        make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, stops, **settings).train()
        if stops:
            model = tiny_seeing_model("qwen3_5")
            trainer = make_trainer(tmp_path / name, CompreSSMCallback(TWO_CUTS), model, rows, [], **settings)
            trainer.train(resume_from_checkpoint=True)
        assert [layer.form for layer in find_layers(model)] == [(2, N)] * 2
        found.append(model.state_dict())
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
