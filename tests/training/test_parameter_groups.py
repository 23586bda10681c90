"""Parameter groups: who is in which, and that the plain Trainer trains with them."""

from __future__ import annotations

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Trainer, TrainingArguments

from hf_compressm.errors import ConfigurationError
from hf_compressm.models import LRUConfig, LRUForSequenceClassification, S4DConfig, S4DForSequenceClassification
from hf_compressm.training import state_space_parameter_groups
from tests.cases import tiny_mamba

SIZES = {"input_size": 1, "hidden_size": 8, "state_size": 6, "num_hidden_layers": 2}


def tiny_mamba2() -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=4, n_groups=1
        )
    )


def names_in(model: torch.nn.Module, group: dict) -> set[str]:
    """The last parts of the names of a group's parameters."""
    wanted = {id(parameter) for parameter in group["params"]}
    return {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if id(parameter) in wanted}


@pytest.mark.parametrize(
    ("build", "dynamics"),
    [
        (lambda: LRUForSequenceClassification(LRUConfig(**SIZES)), {"nu_log", "theta_log", "gamma_log", "B"}),
        (lambda: S4DForSequenceClassification(S4DConfig(**SIZES)), {"log_dt", "A_real_log", "A_imag"}),
        (tiny_mamba, {"A_log"}),
        (tiny_mamba2, {"A_log", "dt_bias"}),
    ],
    ids=["lru", "s4d", "mamba", "mamba2"],
)
def test_every_parameter_is_in_one_group(build, dynamics: set[str]) -> None:
    model = build()
    groups = state_space_parameter_groups(model, 1e-3, weight_decay=0.1, state_space_lr_factor=0.25)
    identities = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(identities) == sorted({id(parameter) for parameter in model.parameters()})
    decayed, plain, own = groups
    assert names_in(model, own) == dynamics
    assert (own["lr"], own["weight_decay"]) == (2.5e-4, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (1e-3, 0.1)
    assert (plain["lr"], plain["weight_decay"]) == (1e-3, 0.0)
    assert names_in(model, decayed).isdisjoint({"bias"})
    assert "bias" in names_in(model, plain) or "weight" in names_in(model, plain)


def test_tags_and_frozen_parameters_are_respected() -> None:
    model = LRUForSequenceClassification(LRUConfig(**SIZES))
    model.head.score.weight._no_weight_decay = True
    model.backbone.layers[0].mixer.B.requires_grad_(False)
    decayed, plain, own = state_space_parameter_groups(model, 1e-3, weight_decay=0.1)
    assert any(parameter is model.head.score.weight for parameter in plain["params"])
    assert not any(parameter is model.backbone.layers[0].mixer.B for parameter in own["params"])


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_trains_each_group_at_its_own_rate(how: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = LRUForSequenceClassification(LRUConfig(**SIZES, dropout=0.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = state_space_parameter_groups(model, 1e-3, weight_decay=0.05, state_space_lr_factor=1e-6)
    data = [{"input_values": torch.randn(10, 1), "labels": label % 2} for label in range(16)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True
    )
    if how == "optimizers":
        given = {"optimizers": (torch.optim.AdamW(groups), None)}
    else:
        given = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}
    trainer = Trainer(model, arguments, train_dataset=data, **given)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-3, 1e-9]
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert moved["backbone.layers.0.mixer.nu_log"] < 1e-6 < 1e-3 < moved["backbone.layers.0.mixer.C"]


@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay", "state_space_lr_factor"])
def test_impossible_numbers_are_refused(setting: str) -> None:
    settings = {"learning_rate": 1e-3, setting: -1.0}
    with pytest.raises(ConfigurationError, match=f"{setting} is -1.0"):
        state_space_parameter_groups(torch.nn.Linear(1, 1), **settings)
