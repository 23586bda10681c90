"""What takes the place of a parameter, and parameters that cannot be cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_compressm.architectures import find_layers, parameters, successor
from hf_compressm.errors import UnsupportedModelError
from tests.cases import tiny_mamba


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_successor_keeps_everything_but_the_values(dtype: torch.dtype, requires_grad: bool) -> None:
    old = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=requires_grad)
    old._no_weight_decay = True
    values = torch.ones(4, 2, dtype=torch.float64)
    new = successor(old, values)
    assert new.dtype == dtype and new.requires_grad == requires_grad and new._no_weight_decay
    values.zero_()
    assert (new == 1).all(), "a successor shares no memory with what it was made from"


def quantised(model):
    mixer = model.backbone.layers[1].mixer
    mixer.x_proj.weight = nn.Parameter(mixer.x_proj.weight.detach().to(torch.int8), requires_grad=False)


def on_meta(model):
    mixer = model.backbone.layers[1].mixer
    mixer.A_log = nn.Parameter(mixer.A_log.detach().to("meta"))


def flattened(model):
    mixer = model.backbone.layers[1].mixer
    mixer.A_log = nn.Parameter(torch.zeros(0))


def partitioned(model):
    model.backbone.layers[1].mixer.A_log.ds_id = 7


def tensor_subclass(model):
    mixer = model.backbone.layers[1].mixer
    mixer.x_proj.weight = nn.Parameter(SubclassedTensor(mixer.x_proj.weight.detach()))


def adapted(model):
    mixer = model.backbone.layers[1].mixer
    adapter = nn.Module()
    adapter.base_layer = mixer.x_proj
    adapter.weight = mixer.x_proj.weight
    mixer.x_proj = adapter


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.backbone.layers[1].mixer.x_proj)


def shared(model):
    layers = model.backbone.layers
    layers[1].mixer.A_log = layers[0].mixer.A_log


class SubclassedTensor(torch.Tensor):
    """Stands for a DTensor or a quantised tensor."""


@pytest.mark.parametrize(
    "damage, message",
    [
        (quantised, "int8, a quantised form"),
        (on_meta, "meta device"),
        (flattened, "sharded or flattened"),
        (partitioned, "partitioned by DeepSpeed"),
        (tensor_subclass, "holds a SubclassedTensor"),
        (adapted, "not a torch.nn.Linear"),
        (parametrised, "a parametrisation, an adapter or a quantised"),
        (shared, "one shared parameter"),
    ],
)
def test_forms_that_cannot_be_cut_are_refused_by_name(damage, message: str) -> None:
    model = tiny_mamba()
    damage(model)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_layers(model)
    assert "layers.1.mixer" in str(caught.value)


def test_devices_without_double_precision_are_refused_before_anything_happens(monkeypatch) -> None:
    assert "mps" in parameters._WITHOUT_DOUBLE_PRECISION
    monkeypatch.setattr(parameters, "_WITHOUT_DOUBLE_PRECISION", frozenset({"cpu"}))
    with pytest.raises(UnsupportedModelError, match="no double precision.*move the model to the CPU"):
        find_layers(tiny_mamba())
