"""Taking the mixed form: the model, its class, its config and the optimizer change together or not at all."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import Mamba2ForCausalLM, Mamba2Model, Mamba2PreTrainedModel, Trainer
from transformers.models.jamba.modeling_jamba import JambaRMSNorm

from hf_compressm import CompreSSMConfig
from hf_compressm.architectures import find_layers
from hf_compressm.compression import Compressor, Snapshot
from hf_compressm.errors import UnsupportedModelError
from tests import selective_models
from tests.cases import logits_of, token_batch
from tests.delta_rule_models import GATED_CONFIGS, KIMI_CONFIGS, tiny_gated_delta_net, tiny_kimi_delta
from tests.lightning_models import tiny_minimax

FAMILIES = [
    "mamba2", "zamba2", "bamba", "falcon_h1", "granite_moe_hybrid", "nemotron_h", "falcon_mamba", "jamba",
    *GATED_CONFIGS, *KIMI_CONFIGS, "minimax",
]  # fmt: skip
HALF = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)
TAKEN_BACK = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, rollback_tolerance=0.0)
every_family = pytest.mark.parametrize("family", FAMILIES)


def trained(family: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after a step of AdamW, in the Trainer's two groups."""
    makers = {
        **{name: functools.partial(tiny_gated_delta_net, name) for name in GATED_CONFIGS},
        **{name: functools.partial(tiny_kimi_delta, name) for name in KIMI_CONFIGS},
        "minimax": tiny_minimax,
    }
    model = (makers.get(family) or getattr(selective_models, f"tiny_{family}"))()
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-2)
    train(model, optimizer)
    return model, optimizer


def trainer_groups(model: nn.Module) -> list[dict]:
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        split[name in decayed].append(parameter)
    return [{"params": split[True], "weight_decay": 0.1}, {"params": split[False], "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    model(**token_batch(), use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All that a cut may change, by value, and which parameter each group of the optimizer has where."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "class": [type(module) for module in model.modules()],
        "config": (type(model.config), copy.deepcopy(model.config.to_dict())),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "names": [name for name, _ in model.named_parameters()],
        "groups": [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }


def assert_same(found: object, wanted: object, where: str = "") -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name in wanted:
            assert_same(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted)):
            assert_same(one, other, f"{where}[{number}]")
    else:
        assert found == wanted, where


class WorseBelow:
    """The loss, 100 higher where the state is smaller than it should be."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, use_cache=False).loss + 100.0 * (size_of(model) < self.size)


@every_family
def test_the_optimizer_has_the_groups_that_a_rebuilt_model_gets(family: str) -> None:
    """A saved optimizer numbers its parameters over the groups; a resumed run gets them in this order."""
    model, optimizer = trained(family)
    names = {name for name, _ in model.named_parameters()}
    assert Compressor(model, HALF, optimizer=optimizer, progress=False).check([token_batch()]).outcome == "cut"
    rebuilt = [[id(parameter) for parameter in group["params"]] for group in trainer_groups(model)]
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == rebuilt
    added = {name: p for name, p in model.named_parameters() if name not in names}
    assert len(added) == 2 * len(find_layers(model))
    before = {name: p.detach().clone() for name, p in added.items()}
    train(model, optimizer)
    for name, parameter in added.items():
        assert not torch.equal(parameter, before[name]), f"{name} is not trained"
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@every_family
def test_a_cut_that_is_taken_back_leaves_no_trace(family: str) -> None:
    model, optimizer = trained(family)
    before = everything(model, optimizer)
    compressor = Compressor(model, TAKEN_BACK, WorseBelow(8), optimizer=optimizer, progress=False)
    assert compressor.check([token_batch()]).outcome == "rolled_back"
    assert [record.outcome for record in compressor.records] == ["cut", "rolled_back"]
    assert_same(everything(model, optimizer), before)
    train(model, optimizer)


def size_of(model: nn.Module) -> int:
    return max(layer.state_size for layer in find_layers(model))


@every_family
def test_a_second_cut_that_is_taken_back_leaves_the_first(family: str) -> None:
    model, optimizer = trained(family)
    assert Compressor(model, HALF, optimizer=optimizer, progress=False).check([token_batch()]).outcome == "cut"
    train(model, optimizer)
    before = everything(model, optimizer)
    compressor = Compressor(model, TAKEN_BACK, WorseBelow(4), optimizer=optimizer, progress=False)
    assert compressor.check([token_batch()]).outcome == "rolled_back"
    assert_same(everything(model, optimizer), before)


@every_family
def test_a_failure_in_the_middle_leaves_everything_as_it_was(family: str) -> None:
    model, optimizer = trained(family)
    before = everything(model, optimizer)
    identities = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]

    class Fails:
        def commit(self) -> None:
            raise OSError("the disk is full")

        def rollback(self) -> None:
            pass

    compressor = Compressor(model, HALF, optimizer=optimizer, followers=[lambda changes: Fails()], progress=False)
    with pytest.raises(OSError, match="the disk is full"):
        compressor.check([token_batch()])
    assert_same(everything(model, optimizer), before)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == identities


with_a_stock_form = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in (*KIMI_CONFIGS, "minimax")]
)


@with_a_stock_form
def test_stock_keeps_the_stock_class(family: str) -> None:
    model, optimizer = trained(family)
    classes = [type(module) for module in model.modules()]
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, stock=True)
    assert Compressor(model, config, optimizer=optimizer, progress=False).check([token_batch()]).outcome == "cut"
    assert [type(module) for module in model.modules()] == classes and size_of(model) == 4
    with pytest.raises(UnsupportedModelError, match="its own state size"):
        Compressor(model, CompreSSMConfig(strategy="tolerance", uniform=False, stock=True))


@with_a_stock_form
def test_a_mixed_cut_after_a_stock_one_has_narrower_projections(family: str, tmp_path) -> None:
    sizes = {}
    for ways in ([0.25], [0.5, 0.5]):
        model, optimizer = trained(family)
        for number, keep_ratio in enumerate(ways, start=1):
            config = CompreSSMConfig(strategy="fixed", keep_ratio=keep_ratio, stock=number < len(ways))
            check = Compressor(model, config, optimizer=optimizer, progress=False).check
            assert check([token_batch()]).outcome == "cut"
        train(model, optimizer)
        sizes[len(ways)] = sum(parameter.numel() for parameter in model.parameters())
        assert {layer.form for layer in find_layers(model)} == {(2, 8 // len(ways))}
    assert sizes[2] < sizes[1]
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again, token_batch()), logits_of(model, token_batch()))


def test_matrices_beside_a_frozen_projection_are_frozen_too() -> None:
    model = selective_models.tiny_mamba2()
    for layer in find_layers(model):
        layer.module.in_proj.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert Compressor(model, HALF, optimizer=optimizer, progress=False).check([token_batch()]).outcome == "cut"
    mixing = [p for name, p in model.named_parameters() if name.endswith("mixing")]
    assert len(mixing) == 4 and not any(p.requires_grad for p in mixing)


def test_an_optimizer_that_would_not_train_the_matrices_is_refused() -> None:
    model = selective_models.tiny_mamba2()
    before = dict(model.named_parameters())
    stray = {id(layer.module.in_proj.weight) for layer in find_layers(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if id(p) not in stray])
    compressor = Compressor(model, HALF, optimizer=optimizer, progress=False)
    with pytest.raises(UnsupportedModelError, match="stock=True"):
        compressor.check([token_batch()])
    assert dict(model.named_parameters()) == before and type(model).__name__ == "Mamba2ForCausalLM"


class Tagger(Mamba2PreTrainedModel):
    """A user's own model around one of transformers."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs) -> dict[str, Tensor]:
        logits = self.head(self.backbone(input_ids, use_cache=False).last_hidden_state)
        return {"loss": logits.square().mean(), "logits": logits}


class OwnLanguageModel(Mamba2ForCausalLM):
    """A user's own subclass."""


@pytest.mark.parametrize("model_class", [Tagger, OwnLanguageModel])
def test_a_model_of_a_users_own_class_is_cut_in_a_form_that_the_class_loads(model_class, tmp_path) -> None:
    torch.manual_seed(0)
    model = model_class(selective_models.tiny_mamba2().config).eval()
    tokens = token_batch()["input_ids"]
    assert Compressor(model, HALF, progress=False).check([token_batch()]).outcome == "cut"
    assert type(model) is model_class and model.config.state_size == 4
    with torch.no_grad():
        expected = model(input_ids=tokens)["logits"]
        model.save_pretrained(tmp_path)
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert torch.equal(loaded.eval()(input_ids=tokens)["logits"], expected)


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_layers_with_a_hook_that_would_hide_their_new_class_stay_as_they_are(family: str) -> None:
    """As `device_map` puts them on the modules of a model that is spread over devices."""
    model = getattr(selective_models, f"tiny_{family}")()
    for module in [module for module in model.modules() if not list(module.children())]:
        add_hook_to_module(module, ModelHook())
    for layer in find_layers(model):
        if not hasattr(layer.module, "_hf_hook"):
            add_hook_to_module(layer.module, ModelHook())
    before, expected = type(model), logits_of(model, token_batch())
    record = Compressor(model, HALF, progress=False).check([token_batch()])
    assert record.outcome == "skipped" and "hook of accelerate" in record.reason and "stock=True" in record.reason
    assert type(model) is before and torch.equal(logits_of(model, token_batch()), expected)
    stock = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, stock=True)
    assert Compressor(model, stock, progress=False).check([token_batch()]).outcome == "cut"


@every_family
def test_layers_that_were_saved_alone_are_put_into_the_model_that_was_built(family: str, tmp_path) -> None:
    """As where a checkpoint holds an adapter only, and the cut base beside it."""
    model, optimizer = trained(family)
    before = copy.deepcopy(model)
    Compressor(model, HALF, optimizer=optimizer).check([token_batch()])
    Snapshot.of(find_layers(model)).save(tmp_path)
    rebuilt = Compressor(before, HALF)
    rebuilt.put_in(Snapshot.load(tmp_path))
    assert type(before) is type(model) and rebuilt.sizes == dict.fromkeys(rebuilt.sizes, 4)
    assert_same(before.state_dict(), model.state_dict())
    assert torch.equal(logits_of(before, token_batch()), logits_of(model, token_batch()))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
def test_an_optimizer_of_matrices_alone_is_refused() -> None:
    model = selective_models.tiny_mamba2()
    before = dict(model.named_parameters())
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    with pytest.raises(UnsupportedModelError, match=r"Muon trains matrices only.*'input_mixing' of shape \(2, 8, 4\)"):
        Compressor(model, HALF, optimizer=optimizer, progress=False).check([token_batch()])
    assert dict(model.named_parameters()) == before


def test_norms_that_a_kernel_would_replace_keep_their_mixing(monkeypatch) -> None:
    """The package `kernels` finds modules by an attribute of their class and gives them another forward pass."""
    monkeypatch.setattr(JambaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    model = selective_models.tiny_jamba()
    norms = [norm for layer in find_layers(model) for norm in (layer.module.b_layernorm, layer.module.c_layernorm)]
    for norm in norms:
        norm.forward = types.MethodType(JambaRMSNorm.forward, norm)
    compressor = Compressor(model, HALF, progress=False)
    assert compressor.check([token_batch()]).outcome == "cut"
    for norm in norms:
        assert not hasattr(type(norm), "kernel_layer_name") and "forward" not in vars(norm)
        assert norm(torch.ones(8)).shape == (4,)
