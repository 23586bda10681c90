"""Training runs in which layers take the mixed form, with the plain Trainer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.hub.loading import load_model
from tests.cases import logits_of, token_batch
from tests.lightning_models import tiny_minimax
from tests.selective_models import tiny_jamba, tiny_mamba2
from tests.training.test_callback import STEPS, Rows, make_trainer
from tests.training.test_resume import SAVES, TWO_CUTS, StopAt

every_model = pytest.mark.parametrize(
    "build", [tiny_mamba2, tiny_jamba, tiny_minimax], ids=lambda build: build.__name__
)
BATCH = {**token_batch(length=12), "use_cache": False}


def forms(model) -> set[tuple[int, int]]:
    return {(layer.state_size, layer.projected_size) for layer in find_layers(model)}


def test_a_training_says_that_a_cut_would_only_add(tmp_path, capsys) -> None:
    # 7 of 8 states: what two matrices of 8 x 7 add is more than the state saves.
    config = CompreSSMConfig(tolerance=0.9, multiple_of=7, window=(0, 4))
    callback, model = CompreSSMCallback(config), tiny_mamba2()
    make_trainer(tmp_path, callback, model, Rows(token_batch(batch=64))).train()
    assert [record.outcome for record in callback.records] == ["kept"] and forms(model) == {(8, 8)}
    assert "kept, left as it was: a cut to 7 states would add 1,792 bytes of weights" in capsys.readouterr().out


@every_model
def test_every_checkpoint_loads_in_the_form_that_the_model_had(build, tmp_path) -> None:
    model = build()
    settings = {**SAVES, "save_steps": 4, "save_total_limit": None, "weight_decay": 0.1}
    make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), model, Rows(token_batch(batch=64)), **settings).train()
    found = []
    for step in (4, 8, STEPS):
        folder = tmp_path / f"checkpoint-{step}"
        loaded = load_model(folder)
        [form] = forms(loaded)
        found.append(form)
        written = json.loads((folder / "config.json").read_text())
        assert written["model_type"].startswith("compressed_") == (form[0] < form[1])
        assert (folder / "mixing.py").exists() == (form[0] < form[1])
    assert found == [(8, 8), (4, 8), (2, 8)]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}").eval()
    torch.testing.assert_close(logits_of(last, BATCH), logits_of(model, BATCH))


@every_model
@pytest.mark.parametrize("best, form", [(3, (8, 8)), (7, (4, 8)), (15, (2, 8))])
def test_the_best_model_comes_back_in_its_own_form(build, best: int, form: tuple[int, int], tmp_path) -> None:
    class Judge(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(abs(state.global_step - best))

    model = build()
    stock = type(model)
    trainer = make_trainer(
        tmp_path, CompreSSMCallback(TWO_CUTS), model, Rows(token_batch(batch=64)), [Judge()],
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.eval_dataset = Rows(token_batch(batch=4))
    trainer.train()
    assert forms(model) == {form}
    assert (type(model) is stock) == (form == (8, 8))
    trainer.save_model(str(tmp_path / "best"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "best").eval()
    assert type(saved) is type(model)
    torch.testing.assert_close(logits_of(saved, BATCH), logits_of(model, BATCH))


@every_model
def test_a_run_in_half_precision_is_cut(build, tmp_path) -> None:
    model = build()
    trainer = make_trainer(tmp_path, CompreSSMCallback(TWO_CUTS), model, Rows(token_batch(batch=64)), bf16=True)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss)) and forms(model) == {(2, 8)}


NARROWER = replace(TWO_CUTS, projection_rows=0.75)


@pytest.mark.parametrize("build", [tiny_mamba2, tiny_jamba], ids=lambda build: build.__name__)
def test_every_checkpoint_of_a_run_whose_projections_give_up_rows_loads(build, tmp_path) -> None:
    model = build()
    settings = {**SAVES, "save_steps": 4, "save_total_limit": None}
    make_trainer(tmp_path, CompreSSMCallback(NARROWER), model, Rows(token_batch(batch=64)), **settings).train()
    found = [forms(load_model(tmp_path / f"checkpoint-{step}")) for step in (4, 8, STEPS)]
    assert found == [{(8, 8)}, {(4, 6)}, {(2, 6)}]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}").eval()
    torch.testing.assert_close(logits_of(last, BATCH), logits_of(model, BATCH))


@pytest.mark.parametrize("build", [tiny_mamba2, tiny_jamba], ids=lambda build: build.__name__)
@pytest.mark.parametrize("stop", [3, 7, 12])
def test_a_run_whose_projections_give_up_rows_is_resumed(build, stop: int, tmp_path) -> None:
    rows, models = Rows(token_batch(batch=64)), [build(), build(), build()]
    trainers = [
        make_trainer(
            tmp_path / folder, CompreSSMCallback(NARROWER), model, rows, callbacks, **{**SAVES, "save_steps": stop}
        )
        for folder, model, callbacks in zip("abb", models, ([], [StopAt(stop)], []))
    ]
    trainers[0].train()
    trainers[1].train()
    trainers[2].train(resume_from_checkpoint=True)
    assert forms(models[0]) == forms(models[2]) == {(2, 6)}
    for (name, a), b in zip(models[0].state_dict().items(), models[2].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_trained_mixed_model_gives_up_rows_in_its_next_training(tmp_path) -> None:
    model = tiny_mamba2()
    rows = Rows(token_batch(batch=64))
    make_trainer(tmp_path / "first", CompreSSMCallback(TWO_CUTS), model, rows).train()
    assert forms(model) == {(2, 8)}
    callback = CompreSSMCallback(CompreSSMConfig(state_size=2, projection_rows=4, window=(0, 5)))
    make_trainer(tmp_path / "second", callback, model, rows).train()
    assert forms(model) == {(2, 4)} and [record.outcome for record in callback.records] == ["cut"]


def test_layers_of_their_own_sizes_are_resumed(tmp_path) -> None:
    config = CompreSSMConfig(
        strategy="tolerance", tolerance=0.02, uniform=False, window=(0.0, 0.1), minimum_reduction=0.0
    )

    def build():
        model = tiny_mamba2()
        with torch.no_grad():
            # Nothing drives states of the first layer but three of each group.
            mixer = find_layers(model)[0].module
            end = mixer.conv1d.out_channels - 2 * mixer.n_groups * 8
            for group in range(mixer.n_groups):
                for parameter in mixer.conv1d.parameters():
                    parameter[end + group * 8 + 3 : end + (group + 1) * 8] = 0
        return model

    settings = {**SAVES, "save_steps": 10}
    first = build()
    make_trainer(tmp_path, CompreSSMCallback(config), first, Rows(token_batch(batch=64)), **settings).train()
    sizes = [layer.state_size for layer in find_layers(first)]
    assert len(set(sizes)) == 2 and first.config.state_sizes == sizes
    resumed = build()
    trainer = make_trainer(tmp_path, CompreSSMCallback(config), resumed, Rows(token_batch(batch=64)), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [layer.state_size for layer in find_layers(resumed)] == sizes
    for (name, a), b in zip(first.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
