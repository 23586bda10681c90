"""Whatever module was cut, its folder and one call, or the lines of its card, give it back."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import Mamba2Model, MambaConfig

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, load_cut_layers
from hf_compressm.architectures import find_layers
from hf_compressm.errors import InconsistentModelError, UnsupportedModelError
from tests.cases import CASES, Case, ModelWithMambaInside, case_id, logits_of, real_valued_batch
from tests.selective_models import tiny_mamba2
from tests.training.test_callback import HALF as IN_TRAINING
from tests.training.test_callback import Rows, make_trainer

HALF = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)


class ModelWithMamba2Inside(ModelWithMambaInside):
    """A user's own module, in plain PyTorch, whose layers a cut mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mamba2Model(tiny_mamba2().config)


def mixed_inside(state_size: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ModelWithMamba2Inside()


OWN = [
    next(case for case in CASES if not case.is_pretrained_model),
    Case("mamba2-inside-a-module", "mamba2", mixed_inside, real_valued_batch, is_pretrained_model=False),
]


def python_of_card(folder) -> str:
    [lines] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return lines


@pytest.mark.parametrize("case", OWN, ids=case_id)
def test_the_cards_lines_give_a_users_own_module_back(case, tmp_path, monkeypatch) -> None:
    model = case.build()
    trainer = make_trainer(tmp_path / "run", CompreSSMCallback(IN_TRAINING), model, Rows(case.batch(batch=64)))
    trainer.eval_dataset = None
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    fresh = case.build(seed=1)
    monkeypatch.chdir(tmp_path)
    exec(python_of_card(tmp_path / "saved"), {"model": fresh})
    assert [layer.form for layer in find_layers(fresh)] == [layer.form for layer in find_layers(model)] != [(8, 8)] * 2
    assert torch.equal(logits_of(fresh, case.batch()), logits_of(model, case.batch()))
    compress(fresh, [case.batch()], HALF)
    assert {layer.state_size for layer in find_layers(fresh)} == {2}, "it can be trained and cut on"


@pytest.mark.parametrize("case", [case for case in CASES if case.is_pretrained_model], ids=case_id)
def test_the_cards_lines_give_a_model_of_transformers_back(case, tmp_path, monkeypatch) -> None:
    model = case.build()
    compress(model, [case.batch()], HALF)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(python_of_card(tmp_path / "saved").replace(", trust_remote_code=True", ""), found)
    assert torch.equal(logits_of(found["model"], case.batch()), logits_of(model, case.batch()))


@pytest.mark.parametrize("case", OWN, ids=case_id)
@pytest.mark.parametrize("form", ["safetensors", "shards", "pytorch_model.bin", "a file"])
def test_plain_pytorch_files_are_read(case, form: str, tmp_path) -> None:
    model = case.build()
    compress(model, [case.batch()], HALF)
    source, state = tmp_path, model.state_dict()
    if form == "safetensors":
        save_model(model, str(tmp_path / "model.safetensors"))
    elif form == "shards":
        names = list(state)
        files = {name: f"model-{place % 3 + 1:05d}-of-00003.safetensors" for place, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: state[n].contiguous() for n in names if files[n] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        source = tmp_path / "mine.pt" if form == "a file" else tmp_path
        torch.save(state, tmp_path / ("mine.pt" if form == "a file" else form))
    fresh = case.build(seed=1)
    load_cut_layers(fresh, source)
    assert torch.equal(logits_of(fresh, case.batch()), logits_of(model, case.batch()))


def test_a_model_already_of_the_right_size_is_loaded_too(tmp_path) -> None:
    case = OWN[1]
    model = case.build()
    compress(model, [case.batch()], HALF)
    save_model(model, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        before = logits_of(model, case.batch())
        model.head.weight.zero_()
    load_cut_layers(model, tmp_path)
    assert torch.equal(logits_of(model, case.batch()), before)


def changed(tensors, change):
    tensors = dict(tensors)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t: t.pop("head.bias"), InconsistentModelError, "head.bias is missing"),
        (lambda t: t.update(other=torch.zeros(2)), InconsistentModelError, "other is not in the model"),
        (lambda t: t.update({"head.bias": torch.zeros(5)}), InconsistentModelError, r"head.bias is \(5,\)"),
        (lambda t: t.pop("body.layers.0.mixer.input_mixing"), InconsistentModelError, "mixing"),
        (lambda t: t.clear(), InconsistentModelError, "has no state size"),
    ],
    ids=["missing", "more", "other shape", "half a layer", "empty"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, error, message: str, tmp_path) -> None:
    model = mixed_inside()
    compress(model, [real_valued_batch()], HALF)
    save_file(changed(model.state_dict(), change), tmp_path / "model.safetensors")
    fresh = mixed_inside(seed=1)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(error, match=message):
        load_cut_layers(fresh, tmp_path)
    after = fresh.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_without_weights_and_a_broken_file_are_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match="neither"):
        load_cut_layers(mixed_inside(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(os.urandom(64))
    with pytest.raises(InconsistentModelError, match="cannot be read"):
        load_cut_layers(mixed_inside(), tmp_path)


def test_names_of_the_stock_config_are_followed(tmp_path) -> None:
    case = OWN[0]
    model = case.build()
    compress(model, [case.batch()], HALF)
    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = case.build()
    load_cut_layers(fresh, tmp_path)
    assert isinstance(fresh.body.config, MambaConfig) and fresh.body.config.state_size == 4
