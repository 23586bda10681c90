"""Training runs whose model needs a compressed class: sizes that differ between layers, and mixed states."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.errors import UnsupportedModelError
from tests.cases import logits_of, tiny_jamba, tiny_mamba, tiny_mamba2, token_batch
from tests.selective_models import tiny_bamba, tiny_falcon_h1, tiny_falcon_mamba, tiny_zamba
from tests.training.test_callback import Notes, make_trainer
from tests.training.test_resume import SAVES, StopAt

ONE_BUDGET = CompreSSMConfig(tolerance=0.3, window=(0.0, 0.5), interval=5, uniform=False, budget="model")
FAMILIES = [tiny_mamba, tiny_mamba2, tiny_jamba]

every_family = pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)


def sizes_of(model) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


@every_family
@pytest.mark.parametrize("stop", [7, 12])
def test_a_run_with_one_budget_resumes_in_the_stock_model_and_loads_from_its_folder(build, stop, tmp_path) -> None:
    whole, parts, rest = Notes(), Notes(), Notes()
    reference = make_trainer(tmp_path / "whole", CompreSSMCallback(ONE_BUDGET), build(), callbacks=[whole],
                             **{**SAVES, "save_strategy": "no"})  # fmt: skip
    reference.train()
    sizes = sizes_of(reference.model)
    assert len(set(sizes)) > 1

    settings = {**SAVES, "save_steps": stop}
    make_trainer(
        tmp_path / "parts", CompreSSMCallback(ONE_BUDGET), build(), callbacks=[parts, StopAt(stop)], **settings
    ).train()
    resumed = build()
    trainer = make_trainer(tmp_path / "parts", CompreSSMCallback(ONE_BUDGET), resumed, callbacks=[rest], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert sizes_of(resumed) == sizes
    assert parts.losses[:stop] + rest.losses[-(20 - stop) :] == pytest.approx(whole.losses, rel=1e-5)
    expected = reference.model.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded).__name__ == type(resumed).__name__ == f"Compressed{build().__class__.__name__}"
    assert loaded.config.state_sizes == sizes
    batch, prompt = token_batch(), token_batch(batch=2, length=7)["input_ids"]
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(resumed.eval(), batch), rtol=1e-5, atol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = loaded.generate(prompt, **settings)
    assert torch.equal(generated, loaded.generate(prompt, use_cache=False, **settings))


@every_family
@pytest.mark.parametrize("best_step", [3, 7])
def test_the_best_checkpoint_gives_its_form_back(build, best_step: int, tmp_path) -> None:
    kept = {}

    class Judge(TrainerCallback):
        """Lets one step look best."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == best_step:
                kept.update(copy.deepcopy(model.state_dict()), model_class=type(model), sizes=sizes_of(model))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = 0.0 if state.global_step == best_step else 1.0 + state.global_step

    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    trainer = make_trainer(tmp_path, CompreSSMCallback(ONE_BUDGET), build(), callbacks=[Judge()], **SAVES, **settings)
    trainer.train()
    model = trainer.model
    sizes = kept.pop("sizes")
    assert sizes_of(model) == sizes
    assert (sizes == [8, 8]) == (best_step < 5)
    assert type(model) is kept.pop("model_class")
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "build, settings",
    [(tiny_mamba2, {"stock": True}), (tiny_jamba, {"stock": True}), (tiny_falcon_h1, {"reductor": "selection"})],
    ids=["mamba2", "jamba", "falcon_h1"],
)
def test_sizes_that_no_checkpoint_holds_are_refused_before_the_first_step(build, settings, tmp_path) -> None:
    callback = CompreSSMCallback(replace(ONE_BUDGET, **settings))
    model = build()
    with pytest.raises(UnsupportedModelError, match="uniform=False would give each layer its own state size"):
        make_trainer(tmp_path, callback, model).train()
    assert sizes_of(model) == [8, 8]


def test_layers_of_any_family_whose_sizes_differ_load_again(tmp_path) -> None:
    for build in (tiny_falcon_h1, tiny_bamba, tiny_falcon_mamba, tiny_zamba):
        model = build()
        compress(model, [token_batch()], ONE_BUDGET)
        assert min(sizes_of(model)) < 8
        model.save_pretrained(tmp_path / build.__name__)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / build.__name__)
        assert type(loaded) is type(model) and sizes_of(loaded) == sizes_of(model)
        torch.testing.assert_close(logits_of(loaded.eval(), token_batch()), logits_of(model.eval(), token_batch()))
