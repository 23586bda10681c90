"""Moment maps, successors and the checks of a layer's parameters."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hf_compressm.architectures import AxisMap, AxisSelection, Rescaling, StateForm, find_layers, register, successor
from hf_compressm.architectures.families.mamba import MambaLayer
from hf_compressm.errors import ConfigurationError, DimensionError, UnsupportedModelError
from tests.cases import tiny_mamba


def test_axis_map_moves_gradients_like_autograd() -> None:
    """If the old weight is W_old = M^T W_new, the new gradient is M times the old one."""
    M = torch.randn(3, 5, dtype=torch.float64)
    new = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    old = (M.T @ new.detach()).requires_grad_()

    def loss(weight):
        return (weight.sin() * torch.arange(20.0, dtype=torch.float64).reshape(5, 4)).sum()

    loss(old).backward()
    loss(M.T @ new).backward()
    assert torch.allclose(AxisMap(0, M).first(old.grad), new.grad)


@pytest.mark.parametrize("axis", [0, 1])
def test_second_moments_move_with_squares_and_stay_non_negative(axis: int) -> None:
    matrix = torch.randn(3, 5, dtype=torch.float64)
    moment = torch.rand((5, 7) if axis == 0 else (7, 5))
    moved = AxisMap(axis, matrix).second(moment)
    expected = torch.einsum("ij,jk->ik" if axis == 0 else "ij,kj->ki", matrix**2, moment.double())
    assert moved.dtype == torch.float32 and torch.allclose(moved.double(), expected) and (moved >= 0).all()


def test_axis_map_refuses_another_length() -> None:
    with pytest.raises(DimensionError, match="6 entries along axis 0; the map takes 5"):
        AxisMap(0, torch.eye(5, dtype=torch.float64)).first(torch.zeros(6, 2))


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


def test_an_unsupported_model_is_told_what_was_found_and_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Supported families: .*mamba.*\. Found: Linear x2, "):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_a_family_name_is_taken_once() -> None:
    assert register(MambaLayer) is MambaLayer
    with pytest.raises(ConfigurationError, match="already registered"):
        register(type("Impostor", (MambaLayer,), {}))


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
        (parametrised, "a parametrisation or an adapter"),
        (shared, "one shared parameter"),
    ],
)
def test_forms_that_cannot_be_cut_are_refused_by_name(damage, message: str) -> None:
    model = tiny_mamba()
    damage(model)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_layers(model)
    assert "layers.1.mixer" in str(caught.value)


def test_a_selection_moves_moments_as_rows_of_the_identity_do() -> None:
    kept = torch.tensor([1, 3, 4])
    selection, matrix = AxisSelection(1, kept, 6), AxisMap(1, torch.eye(6, dtype=torch.float64)[kept], kept)
    moment = torch.rand(4, 6)
    assert torch.equal(selection.first(moment), matrix.first(moment))
    assert torch.equal(selection.second(moment), matrix.second(moment))
    assert torch.equal(selection.sliced().first(moment.T, axis=0), matrix.sliced().first(moment.T, axis=0))
    with pytest.raises(DimensionError, match="5 entries along axis 1; the map takes 6"):
        selection.first(torch.zeros(2, 5))


def test_each_block_is_mapped_by_its_own_matrix() -> None:
    matrices = torch.randn(2, 3, 5, dtype=torch.float64)
    kept = torch.tensor([[0, 2, 4], [1, 2, 3]])
    moment = torch.rand(2, 5, 7, dtype=torch.float64)
    blocks, singles = AxisMap(1, matrices, kept), [AxisMap(0, M, k) for M, k in zip(matrices, kept)]
    for move in ("first", "second"):
        expected = torch.stack([getattr(single, move)(part) for single, part in zip(singles, moment)])
        torch.testing.assert_close(getattr(blocks, move)(moment), expected)
    picked = torch.stack([single.sliced().first(part) for single, part in zip(singles, moment)])
    torch.testing.assert_close(blocks.sliced().first(moment), picked)
    # A factor of Adafactor's lacks the last axis.
    torch.testing.assert_close(blocks.second(moment[..., 0]), blocks.second(moment)[..., 0])


def test_moments_of_a_rescaled_parameter() -> None:
    moment = torch.rand(4, 3)
    halved = Rescaling(0.5)
    assert torch.equal(halved.first(moment), moment / 2) and torch.equal(halved.second(moment), moment / 4)
    assert torch.equal(halved.sliced().first(moment), moment)
    assert torch.equal(halved.second(moment[:, 0], axis=0), moment[:, 0] / 4)


def test_the_form_of_a_state_is_a_pair_everywhere() -> None:
    form = find_layers(tiny_mamba())[0].form
    assert isinstance(form, StateForm) and form == (8, 8) and not form.is_mixed
    assert StateForm(3, 8).is_mixed and json.dumps({"a": StateForm(3, 8)}) == '{"a": [3, 8]}'
