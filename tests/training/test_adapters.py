"""A run with an adapter saves the adapter alone; the cut base below it must not be lost."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, load_cut_layers
from hf_compressm.architectures import find_layers
from hf_compressm.compression import LAYERS_NAME
from hf_compressm.errors import UnsupportedModelError
from tests.cases import logits_of, tiny_mamba, token_batch
from tests.selective_models import tiny_bamba, tiny_falcon_mamba, tiny_jamba, tiny_mamba2
from tests.training.test_callback import HALF, Rows, make_trainer

peft = pytest.importorskip("peft")

BASES = {"mamba": (tiny_mamba, "in_proj"), "mixed": (tiny_mamba2, "lm_head"), "normed": (tiny_falcon_mamba, "in_proj")}


def adapted(base):
    """A base from a folder, with an adapter on modules that no cut touches."""
    build, module = BASES[base.name]
    if not base.exists():
        build().save_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.fixture(scope="module", params=BASES)
def trained(request, tmp_path_factory):
    """The base's folder, the folder of what the Trainer saved at the end, the Trainer, and what was logged then."""
    folder = tmp_path_factory.mktemp("adapter")
    base, saved = folder / request.param, folder / "trained"
    model = adapted(base)
    rows = Rows(token_batch(batch=64))
    trainer = make_trainer(
        folder / "run", CompreSSMCallback(HALF), model, rows, save_strategy="steps", save_steps=10, logging_steps=100
    )
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("hf_compressm").addHandler(handler)
    try:
        trainer.train()
        assert not any("adapter" in line for line in lines), "checkpoints are resumed from, without a warning"
        trainer.save_model(str(saved))
    finally:
        logging.getLogger("hf_compressm").removeHandler(handler)
    model.eval()
    return base, saved, trainer, lines


def test_every_save_has_the_cut_layers_and_says_so(trained, tmp_path) -> None:
    _, saved, trainer, lines = trained
    trainer.model.save_pretrained(tmp_path / "alone")
    checkpoints = sorted((saved.parent / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for folder in (saved, tmp_path / "alone", *checkpoints):
        assert (folder / "adapter_config.json").is_file() and (folder / LAYERS_NAME).is_file()
        card = (folder / "README.md").read_text()
        assert "load_cut_layers(model" in card and f"lie in `{LAYERS_NAME}`" in card and "PeftModel" in card
    [warning] = [line for line in lines if "adapter" in line]
    assert "load_cut_layers" in warning and "merge_and_unload()" in warning and str(saved) in warning


def test_the_cut_layers_can_be_put_back_before_or_below_the_adapter(trained) -> None:
    base, saved, trainer, _ = trained
    expected = logits_of(trainer.model, token_batch())
    first = AutoModelForCausalLM.from_pretrained(base)
    load_cut_layers(first, saved)
    below = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    load_cut_layers(below, str(saved))
    followed = AutoModelForCausalLM.from_pretrained(saved)
    assert {layer.state_size for layer in find_layers(followed)} == {8}, "the uncut base, without an error"
    load_cut_layers(followed, saved)
    for model in (peft.PeftModel.from_pretrained(first, saved), below, followed):
        assert {layer.state_size for layer in find_layers(model)} == {4}
        assert torch.equal(logits_of(model.eval(), token_batch()), expected)


def test_a_merged_model_is_saved_whole_with_its_card(trained, tmp_path) -> None:
    base, saved, _, _ = trained
    model = adapted(base)
    make_trainer(tmp_path / "run", CompreSSMCallback(HALF), model, Rows(token_batch(batch=64))).train()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "from 8 to 4 states" in card and "load_cut_layers" not in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded, token_batch()), logits_of(merged, token_batch()))


def test_layers_of_another_model_are_refused(trained, tmp_path) -> None:
    _, saved, _, _ = trained
    with pytest.raises(UnsupportedModelError, match="Give the model that the adapter was trained on"):
        load_cut_layers(torch.nn.ModuleList([tiny_mamba(num_hidden_layers=1)]), saved)
    with pytest.raises(UnsupportedModelError, match=f"has neither {LAYERS_NAME}"):
        load_cut_layers(tiny_mamba(), tmp_path)


def test_a_repository_s_layers_are_downloaded(trained, monkeypatch) -> None:
    base, saved, _, _ = trained
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(saved / name)

    monkeypatch.setattr("hf_compressm.saving.adapters.hf_hub_download", download)
    model = AutoModelForCausalLM.from_pretrained(base)
    load_cut_layers(model, "me/adapter")
    assert asked == [("me/adapter", LAYERS_NAME)] and {layer.state_size for layer in find_layers(model)} == {4}


def test_an_adapter_without_a_cut_has_no_layers_beside_it(tmp_path) -> None:
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0, 20))
    trainer = make_trainer(tmp_path / "run", CompreSSMCallback(config), adapted(tmp_path / "mamba"))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").is_file()
    assert not (tmp_path / "saved" / LAYERS_NAME).exists()


@pytest.mark.parametrize(
    "build, module",
    [(tiny_mamba2, "in_proj"), (tiny_bamba, "in_proj"), (tiny_falcon_mamba, "x_proj"), (tiny_jamba, "x_proj")],
)
def test_an_adapter_on_a_projection_that_a_mixed_cut_keeps_is_trained_on(build, module, tmp_path) -> None:
    config = peft.LoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(tmp_path, CompreSSMCallback(HALF), model, Rows(token_batch(batch=64))).train()
    assert {layer.state_size for layer in find_layers(model)} == {4}
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(values, after[name]) for name, values in before.items())
    expected = logits_of(model.eval(), token_batch())
    torch.testing.assert_close(logits_of(model.merge_and_unload().eval(), token_batch()), expected)


@pytest.mark.parametrize("build, module", [(tiny_mamba2, "in_proj"), (tiny_falcon_mamba, "x_proj")])
@pytest.mark.parametrize("settings", [{"stock": True}, {"reductor": "selection"}], ids=str)
def test_an_adapter_on_a_projection_that_the_form_cuts_is_refused_before_the_first_step(
    build, module, settings, tmp_path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(), config)
    callback = CompreSSMCallback(CompreSSMConfig(strategy="fixed", keep_ratio=0.5, **settings))
    with pytest.raises(UnsupportedModelError, match=f"Leave {module} out of the adapter's target modules"):
        make_trainer(tmp_path, callback, model, Rows(token_batch(batch=64))).train()
