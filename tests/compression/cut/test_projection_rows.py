"""Mixed layers give up rows of their projections: outputs, moments, files and the way back."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress, load_cut_layers
from hf_compressm.architectures import StateForm, find_layers
from hf_compressm.compression import Compressor, PendingCut
from hf_compressm.errors import ConfigurationError, UnsupportedModelError
from tests import selective_models
from tests.cases import logits_of, tiny_lru, tiny_mamba, token_batch
from tests.compression.cut.test_mixed_form import assert_same, everything, train, trainer_groups
from tests.compression.cut.test_pending_cut import averages_of, values_of
from tests.delta_rule_models import tiny_gated_delta_net, tiny_kimi_delta
from tests.lightning_models import tiny_minimax
from tests.models.compressed.test_compressed import WITH_THE_LIBRARY, duplicate_states
from tests.models.test_remote_code import WITHOUT_THE_LIBRARY

MULTI_HEAD = ("mamba2", "zamba2", "bamba", "falcon_h1", "granite_moe_hybrid", "nemotron_h")
FAMILIES = (*MULTI_HEAD, "falcon_mamba", "jamba")
every_family = pytest.mark.parametrize("family", FAMILIES)
BATCH = token_batch()
MIXED = CompreSSMConfig(state_size=2)
NARROW = CompreSSMConfig(state_size=2, projection_rows=4)
JUDGED_LATER = CompreSSMConfig(state_size=2, projection_rows=4, rollback_tolerance=0.0, rollback_metric="eval_loss")


def build(family: str) -> nn.Module:
    return getattr(selective_models, f"tiny_{family}")().eval()


def redundant(family: str) -> nn.Module:
    """A model in which every row of B and of C is there twice."""
    model = build(family)
    with torch.no_grad():
        for layer in find_layers(model):
            duplicate_states(layer.module)
    return model


def cut(model: nn.Module, config: CompreSSMConfig, optimizer=None, **settings) -> Compressor:
    """What the Gramians make, unless a configuration asks for a fit."""
    config = replace(config, fit_readout=bool(config.fit_readout))
    compressor = Compressor(model, config, optimizer=optimizer, progress=False, **settings)
    assert compressor.check([BATCH], step=3).outcome == "cut"
    model.eval()
    return compressor


def forms(model: nn.Module) -> set[StateForm]:
    return {layer.form for layer in find_layers(model)}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every_family
@pytest.mark.parametrize("later", [False, True], ids=["with_the_cut", "later"])
def test_nothing_is_lost_where_the_rows_that_go_are_redundant(family: str, later: bool) -> None:
    model, reference = redundant(family), redundant(family)
    whole = parameters(model)
    for each in (model, reference) if later else ():
        cut(each, CompreSSMConfig(state_size=4))
        assert forms(each) == {(4, 8)}
    cut(reference, CompreSSMConfig(state_size=3))
    [record] = cut(model, CompreSSMConfig(state_size=3, projection_rows=4)).records
    assert forms(reference) == {(3, 8)} and forms(model) == {(3, 4)} and parameters(model) < whole
    assert record.parameters_after == parameters(model)
    assert {(layer.rows_before, layer.rows_after) for layer in record.layers} == {(8, 4)}
    assert "rows of B and C 8 -> 4" in record.summary()
    for use_cache in (False, True):
        found, expected = (logits_of(each, {**BATCH, "use_cache": use_cache}) for each in (model, reference))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@every_family
def test_only_the_rows_go_from_a_layer_that_keeps_its_states(family: str) -> None:
    model = redundant(family)
    cut(model, MIXED)
    before = logits_of(model, {**BATCH, "use_cache": False})
    [record] = cut(model, NARROW).records
    assert record.reason == "the mixing needs fewer rows of the projections"
    assert forms(model) == {(2, 4)} and {layer.size_after for layer in record.layers} == {2}
    for use_cache in (False, True):
        found = logits_of(model, {**BATCH, "use_cache": use_cache})
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)
    assert compress(model, [BATCH], NARROW, progress=False).outcome == "kept"


@every_family
def test_rows_that_no_mixing_reads_go_first(family: str) -> None:
    model = build(family)
    cut(model, MIXED)
    with torch.no_grad():
        for layer in find_layers(model):
            for name, parameter in layer.module.named_parameters():
                if name.endswith("mixing"):
                    parameter[..., ::2, :] = 0
    before = logits_of(model, {**BATCH, "use_cache": False})
    cut(model, NARROW)
    found = logits_of(model, {**BATCH, "use_cache": False})
    if family in MULTI_HEAD:
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)
    else:
        # The norm is over fewer entries.
        assert (found - before).norm() < 0.5 * before.norm()


@every_family
def test_rows_go_twice_and_states_after_them(family: str) -> None:
    model = build(family)
    cut(model, CompreSSMConfig(state_size=2, projection_rows=6))
    assert forms(model) == {(2, 6)}
    cut(model, NARROW)
    assert forms(model) == {(2, 4)}
    cut(model, CompreSSMConfig(state_size=1))
    assert forms(model) == {(1, 4)}
    model.train()
    model(**BATCH, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for layer in find_layers(model)
               for p in layer.replaceable_parameters().values())  # fmt: skip


@every_family
def test_moments_follow_the_rows(family: str) -> None:
    """In a model of twins the gradients after it are those before it, of the rows that stay."""
    model = redundant(family)
    cut(model, MIXED)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    names = {name for name, _ in model.named_parameters()}
    gradients(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": parameter.grad.clone(),
                "exp_avg_sq": parameter.grad.square(),
            }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()
            if parameter in optimizer.state}  # fmt: skip
    cut(model, NARROW, optimizer)
    assert {name for name, _ in model.named_parameters()} == names
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    [layer, *_] = find_layers(model)
    for name, parameter in layer.replaceable_parameters().items():
        path = f"{layer.name}.{name}"
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        if name.endswith(("in_proj.weight", "x_proj.weight", "conv1d.weight")):
            # Each row that is left is one that was there, and so is its moment.
            rows = (before[path].flatten(1)[None] == parameter.detach().flatten(1)[:, None]).all(-1)
            moments = (kept[path].flatten(1)[None] == state["exp_avg"].flatten(1)[:, None]).all(-1)
            assert (rows & moments).any(-1).all()
            assert len(parameter) < len(before[path])
    train(model, optimizer)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.eval()
    model(**BATCH, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MULTI_HEAD)
def test_moments_of_the_matrices_are_the_gradients_that_they_have_then(family: str) -> None:
    model = redundant(family)
    cut(model, MIXED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    found = gradients(model)
    for name, parameter in model.named_parameters():
        if name in found:
            optimizer.state[parameter] = {"momentum_buffer": found[name].clone()}
    cut(model, NARROW, optimizer)
    after = gradients(model)
    for name, parameter in model.named_parameters():
        if name.endswith("mixing"):
            momentum = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(momentum, after[name], rtol=1e-2, atol=1e-3 * after[name].abs().max().item())


@every_family
@pytest.mark.parametrize("from_stock", [True, False])
@pytest.mark.parametrize("restart", [False, True])
def test_the_way_back_leaves_no_trace(family: str, from_stock: bool, restart: bool, tmp_path) -> None:
    model = build(family)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-2)
    train(model, optimizer)
    if not from_stock:
        cut(model, CompreSSMConfig(state_size=4), optimizer)
        train(model, optimizer)
    averages = averages_of(model)
    before, copies = everything(model, optimizer), values_of(averages)
    compressor = cut(model, JUDGED_LATER, optimizer, find_copies=lambda: averages)
    assert forms(model) == {(2, 4)} == forms(averages["module"].module)
    train(model, optimizer)
    if restart:
        compressor.pending.save(tmp_path)
        compressor.restore(compressor.records, PendingCut.load(tmp_path, judge_at=4))
    record = compressor.take_back("it hurt", step=4)
    assert {(layer.rows_before, layer.rows_after) for layer in record.layers} == {(4, 8)}
    after = everything(model, optimizer)
    # Steps were counted on; parameters that no cut touches were trained on.
    touched = {
        f"{layer.name}.{name}"
        for layer in find_layers(model)
        for name in layer.replaceable_parameters().keys() - layer.rescaled_parameters().keys()
    }
    for part in ("class", "config", "names", "groups"):
        assert_same(after[part], before[part], part)
    for name, value in before["state"].items():
        if name in touched:
            assert torch.equal(after["state"][name], value), name
    found = values_of(averages)
    for name, expected in copies.items():
        assert found[name].keys() == expected.keys()
        assert all(torch.equal(found[name][key], value) for key, value in expected.items()), name


@every_family
def test_a_cut_that_is_taken_back_at_once_is_undone_to_the_bit(family: str) -> None:
    model = build(family)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-2)
    train(model, optimizer)
    cut(model, MIXED, optimizer)
    train(model, optimizer)
    before = everything(model, optimizer)

    def worse_with_fewer_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, use_cache=False).loss + 100.0 * (forms(model) == {(2, 4)})

    config = CompreSSMConfig(state_size=2, projection_rows=4, rollback_tolerance=0.0)
    compressor = Compressor(model, config, worse_with_fewer_rows, optimizer=optimizer, progress=False)
    assert compressor.check([BATCH]).outcome == "rolled_back"
    assert_same(everything(model, optimizer), before)
    train(model, optimizer)


@every_family
def test_averages_of_the_weights_are_cut_alike(family: str) -> None:
    model = build(family)
    cut(model, MIXED)
    averages = {"module": AveragedModel(model), "tensors": {n: p.detach() * 1.0 for n, p in model.named_parameters()}}
    cut(model, NARROW, find_copies=lambda: averages)
    for name, parameter in model.named_parameters():
        assert torch.equal(averages["tensors"][name], parameter.detach()), name
        assert torch.equal(averages["module"].module.get_parameter(name), parameter), name


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory) -> list[tuple[str, str]]:
    """Folder and class name of a model of each family whose projections have given rows up."""
    found = []
    for family in FAMILIES:
        model = build(family)
        assert compress(model, [BATCH], NARROW, progress=False).outcome == "cut"
        model.eval()
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        inputs = {"input_ids": BATCH["input_ids"].clamp_min(1)}
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        torch.save({"inputs": inputs, "logits": logits_of(model, inputs), "generated": generated},
                   folder / "expected.pt")  # fmt: skip
        found.append((str(folder), type(model).__name__))
    return found


@pytest.mark.parametrize("script", [WITH_THE_LIBRARY, WITHOUT_THE_LIBRARY], ids=["with_library", "without_library"])
def test_a_fresh_process_loads_what_was_saved(script: str, saved_folders, tmp_path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    arguments = [f"{folder}::AutoModelForCausalLM" for folder, _ in saved_folders]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [name for _, name in saved_folders]


@pytest.mark.parametrize(
    "make, message",
    [
        (tiny_mamba, "a cut makes them as small as the state already"),
        (tiny_lru, "a cut makes them as small as the state already"),
        (functools.partial(tiny_gated_delta_net, "qwen3_next", 8), "other sizes, or a norm, hang on their width"),
        (functools.partial(tiny_kimi_delta, "kimi_linear"), "other sizes, or a norm, hang on their width"),
        (tiny_minimax, "other sizes, or a norm, hang on their width"),
    ],
)
def test_families_that_cannot_say_so_before_anything_is_changed(make, message: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        compress(model, [BATCH], NARROW, progress=False)
    assert_same(dict(model.state_dict()), dict(before))


def test_layers_of_falcon_h1_give_rows_up_together() -> None:
    """transformers keeps its multipliers for one size."""
    model = build("falcon_h1")
    config = CompreSSMConfig(state_size=2, projection_rows=4, target_layers=[find_layers(model)[0].name])
    with pytest.raises(UnsupportedModelError, match="may be cut and .* may not"):
        compress(model, [BATCH], config, progress=False)


def test_an_adapter_on_the_projection_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = build("mamba2")
    lora = peft.LoraConfig(r=2, target_modules=["in_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="Leave in_proj out of the adapter's target modules"):
        compress(peft.get_peft_model(model, lora), [BATCH], NARROW, progress=False)


def test_layers_below_an_adapter_come_back_with_their_rows(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = build("bamba")
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    assert compress(model, [BATCH], NARROW, progress=False).outcome == "cut"
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_cut_layers(again, tmp_path / "adapter")
    assert forms(again) == {(2, 4)}
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded, BATCH), logits_of(model, BATCH))


def test_an_optimizer_that_does_not_train_the_projections_is_refused_and_nothing_changes() -> None:
    model = build("mamba2")
    cut(model, MIXED)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "in_proj" not in name])
    before = everything_but_groups(model)
    with pytest.raises(UnsupportedModelError, match="parameters that would be cut are not in AdamW"):
        compress(model, [BATCH], NARROW, optimizer=optimizer, progress=False)
    assert_same(everything_but_groups(model), before)


def everything_but_groups(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("value", [0, 1, -3, 0.0, 1.0, 1.5, float("nan"), True, "half", [4]])
def test_rows_that_are_no_number_or_share_are_refused(value) -> None:
    with pytest.raises(ConfigurationError, match="projection_rows is .*; give a share strictly between 0 and 1"):
        CompreSSMConfig(projection_rows=value)


def test_a_stock_class_has_no_rows_to_give_up() -> None:
    with pytest.raises(ConfigurationError, match=r"projection_rows is 0\.5, .*with stock=True"):
        CompreSSMConfig(projection_rows=0.5, stock=True)


def test_there_are_more_rows_than_states_and_what_kernels_take() -> None:
    model = build("mamba2")
    # Two groups: four rows for every one of them, beside 32 channels; causal-conv1d takes multiples of eight.
    cut(model, CompreSSMConfig(state_size=2, projection_rows=2))
    assert forms(model) == {(2, 4)}
    jamba = build("jamba")
    cut(jamba, CompreSSMConfig(state_size=2, projection_rows=0.1))
    assert forms(jamba) == {(2, 3)}


def test_a_share_is_one_of_the_rows_at_the_start_of_the_run() -> None:
    model = build("mamba2")
    compressor = Compressor(model, CompreSSMConfig(strategy="fixed", projection_rows=0.75), progress=False)
    assert compressor.check([BATCH]).outcome == "cut" and forms(model) == {(4, 6)}
    assert compressor.check([BATCH]).outcome == "cut" and forms(model) == {(2, 6)}


def test_a_selection_of_states_in_a_stock_layer_has_no_rows_to_give_up() -> None:
    model = build("mamba2")
    cut(model, CompreSSMConfig(state_size=4, reductor="selection", projection_rows=6))
    assert forms(model) == {(4, 4)}
