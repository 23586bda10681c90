"""The forward pass of a Mamba mixer in the layout of its projections: when it runs, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.zamba import modeling_zamba

import hf_compressm
from hf_compressm.architectures import find_layers
from hf_compressm.architectures.scans import mixer as mixer_switch
from hf_compressm.architectures.scans.mixer_forms import SingleForm
from hf_compressm.ops import selective_scan_reference
from tests.cases import tiny_mamba, token_batch
from tests.selective_models import tiny_falcon_mamba, tiny_jamba, tiny_zamba

BUILD = {"mamba": tiny_mamba, "falcon_mamba": tiny_falcon_mamba, "jamba": tiny_jamba, "zamba": tiny_zamba}
# Of each model: one a layer, and in Zamba one a head.
SCANS = {"mamba": 2, "falcon_mamba": 2, "jamba": 2, "zamba": 4}
CLASSES = {
    "mamba": modeling_mamba.MambaMixer,
    "falcon_mamba": modeling_falcon_mamba.FalconMambaMixer,
    "jamba": modeling_jamba.JambaMambaMixer,
    "zamba": modeling_zamba.ZambaMambaMixer,
}
# How these families call the size of the filter, and whether it has a bias.
FILTER = {
    "mamba": ("conv_kernel", "use_conv_bias"),
    "falcon_mamba": ("conv_kernel", "use_conv_bias"),
    "jamba": ("mamba_d_conv", "mamba_conv_bias"),
    "zamba": ("mamba_d_conv", "mamba_conv_bias"),
}
FORWARD = {name: vars(cls)["forward"] for name, cls in CLASSES.items()}
families = pytest.mark.parametrize("family", BUILD)


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    yield
    assert all(vars(cls)["forward"] is FORWARD[name] for name, cls in CLASSES.items())


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    real = mixer_switch.selective_scan

    def counted(**kwargs):
        calls.append(kwargs["u"].shape)
        return real(**kwargs)

    monkeypatch.setattr(mixer_switch, "selective_scan", counted)
    return calls


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, tuple(CLASSES.values()))]


def loss_and_gradients(model: nn.Module, fast: bool, **batch) -> dict[str, Tensor]:
    """In training, with the switch on or off; the model keeps no gradient."""
    model.train()
    model.zero_grad()
    with hf_compressm.fast_cpu_scan(fast):
        output = model(**batch, use_cache=False)
        output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": output.logits, **found}


def require_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, least: float = 1e-12
) -> None:
    """Relative errors; what is smaller than `least` times the largest value has no digits to compare."""
    assert found.keys() == expected.keys()
    least = least * max(value.double().norm() for value in expected.values())
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(least)
        assert error < tolerance, f"{name} differs by {float(error):.1e}"


def padded(side: str) -> dict[str, Tensor]:
    batch, mask = token_batch(), torch.ones(4, 20, dtype=torch.long)
    for row, missing in ((0, 7), (2, 15)):
        mask[row, slice(0, missing) if side == "left" else slice(20 - missing, 20)] = 0
    return {**batch, "attention_mask": mask}


@families
@pytest.mark.parametrize("batch", [{}, {"batch": 1}, {"length": 1}, {"batch": 1, "length": 67}], ids=str)
def test_values_and_gradients_are_those_of_transformers(family, batch, fused_calls) -> None:
    model, batch = BUILD[family](), token_batch(**batch)
    # A loss for one step too, which has no next token.
    model.loss_function = lambda logits, labels, *_, **__: nn.functional.cross_entropy(logits.mT, labels)
    expected = loss_and_gradients(model, False, **batch)
    assert not fused_calls
    found = loss_and_gradients(model, True, **batch)
    assert len(mixers(model)) == 2 and len(fused_calls) == SCANS[family]
    # The gradient of attention's queries is zero but for rounding where there is one key.
    one_key = family == "zamba" and batch["input_ids"].shape[1] == 1
    require_equal(found, expected, 1e-4, least=1e-3 if one_key else 1e-12)


@families
@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_other_filters(family, taps, bias, fused_calls) -> None:
    model = BUILD[family](**dict(zip(FILTER[family], (taps, bias))))
    assert mixers(model)[0].conv1d.weight.shape[-1] == taps and (mixers(model)[0].conv1d.bias is not None) is bias
    expected, found = (loss_and_gradients(model, fast, **token_batch()) for fast in (False, True))
    require_equal(found, expected, 1e-4)
    assert fused_calls


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_as_in_transformers(family, side, fused_calls) -> None:
    model = BUILD[family]()
    model.set_attn_implementation("eager")
    expected, found = (loss_and_gradients(model, fast, **padded(side)) for fast in (False, True))
    require_equal(found, expected, 1e-4)
    assert fused_calls


@families
def test_in_double_precision_it_is_the_same_mathematics(family, monkeypatch) -> None:
    """transformers' own scan rounds its B to single precision; with the reference in its place nothing is rounded."""

    def scan(u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **_):
        arguments = (u.mT, dt.mT, A, B.mT, C.mT)
        around = {"D": D, "z": z.mT, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        return selective_scan_reference(*arguments, **around)[0].mT

    model = BUILD[family]().double()
    monkeypatch.setattr(__import__("sys").modules[CLASSES[family].__module__], "mamba_selective_scan", scan)
    expected, found = (loss_and_gradients(model, fast, **token_batch()) for fast in (False, True))
    # The norms of these families are computed in single precision by transformers.
    require_equal(found, expected, 1e-9 if family == "mamba" else 1e-5)


@families
def test_half_precision_is_as_good_as_that_of_transformers(family, fused_calls) -> None:
    exact = loss_and_gradients(BUILD[family]().double(), False, **token_batch())
    errors = []
    for fast in (False, True):
        found = loss_and_gradients(BUILD[family]().bfloat16(), fast, **token_batch())
        assert all(value.dtype == torch.bfloat16 for name, value in found.items() if name != "logits")
        errors.append({n: float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact})
    assert fused_calls
    stock, fused = (sum(sorted(found.values())) / len(found) for found in errors)
    assert fused < 1.2 * stock + 0.005


@families
def test_autocast(family, fused_calls) -> None:
    model = BUILD[family]()
    exact = loss_and_gradients(model, False, **token_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(model, True, **token_batch())
    assert fused_calls and all(value.dtype == exact[name].dtype for name, value in found.items() if name != "logits")
    total = sum((value.float() - exact[name]).square().sum() for name, value in found.items() if name != "logits")
    assert total.sqrt() < 0.05 * sum(exact[name].square().sum() for name in found if name != "logits").sqrt()


def test_gradient_checkpointing(fused_calls) -> None:
    model = tiny_mamba()
    expected = loss_and_gradients(model, False, **token_batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    require_equal(loss_and_gradients(model, True, **token_batch()), expected, 1e-4)
    assert len(fused_calls) == 4, "each layer runs again in the backward pass"


@families
def test_layers_that_are_cut_and_mix_states_run_through_it_too(family, fused_calls) -> None:
    model = BUILD[family]()
    config = hf_compressm.CompreSSMConfig(strategy="fixed", keep_ratio=0.5, fast_cpu_scan=False)
    hf_compressm.compress(model, [token_batch()], config)
    assert [mixer.A_log.shape[-1] for mixer in mixers(model)] == [4, 4]
    assert not fused_calls
    expected, found = (loss_and_gradients(model, fast, **token_batch()) for fast in (False, True))
    assert len(fused_calls) == SCANS[family]
    require_equal(found, expected, 1e-4)


# ---- calls that are for transformers' own forward pass


@families
def test_a_call_with_a_cache(family, fused_calls) -> None:
    model = BUILD[family]().eval()
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        with hf_compressm.fast_cpu_scan():
            found = model(ids, use_cache=True)
            assert not fused_calls
            without = model(ids, use_cache=False)
            assert len(fused_calls) == SCANS[family]
    for logits in (found.logits, without.logits):
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_an_observed_layer_shows_its_scan(fused_calls) -> None:
    model, seen = tiny_mamba(), []

    class Watcher:
        def observe(self, inputs, output):
            seen.append(output.shape)
            return output

    first = find_layers(model)[0]
    with hf_compressm.fast_cpu_scan(), first.observed(Watcher()):
        model(**token_batch(), use_cache=False)
    assert seen == [(4, 20, 32)] and len(fused_calls) == 1, "the layer that nobody watches is fast"


def left_alone(change: Callable[[nn.Module], None], fused_calls: list, expected_calls: int = 0, **call) -> None:
    """The first mixer of a changed model gives the same with the switch on and off, and takes the stock way."""
    model = tiny_mamba()
    change(mixers(model)[0])
    mixer, x = mixers(model)[0], torch.randn(2, 9, 16)
    expected = mixer(x, **call)
    with hf_compressm.fast_cpu_scan():
        found = mixer(x, **call)
    assert len(fused_calls) == expected_calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Wrapped(nn.Linear):
    """Stands for an adapter, whose weight is not all that it does."""


def _wrap(mixer: nn.Module) -> None:
    mixer.dt_proj.__class__ = Wrapped


def _hook(mixer: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(mixer.conv1d, ModelHook())


def _other_activation(mixer: nn.Module) -> None:
    mixer.activation, mixer.act = "gelu", nn.GELU()


def _quantised(mixer: nn.Module) -> None:
    mixer.config = copy.copy(mixer.config)
    mixer.config._is_quantized = True


def _lacks_a_norm(mixer: nn.Module) -> None:
    mixer.b_layernorm = nn.Identity()


@pytest.mark.parametrize("change", [_wrap, _hook, _other_activation, _quantised, _lacks_a_norm])
def test_a_mixer_that_is_not_quite_as_expected(change, fused_calls) -> None:
    left_alone(change, fused_calls)


def test_arguments_by_position(fused_calls) -> None:
    model, x = tiny_mamba(), torch.randn(2, 9, 16)
    mixer, mask = mixers(model)[0], torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    expected = mixer(x, None, mask)
    with hf_compressm.fast_cpu_scan():
        torch.testing.assert_close(mixer(x, None, mask), expected, rtol=1e-4, atol=1e-6)
        assert not fused_calls
        torch.testing.assert_close(mixer(x, attention_mask=mask), expected, rtol=1e-4, atol=1e-6)
        assert len(fused_calls) == 1
        mixer(x, cache=DynamicCache(config=model.config), attention_mask=mask)
    assert len(fused_calls) == 1


def test_modules_that_are_called_may_be_anything(fused_calls) -> None:
    """Adapters and hooks of the projections see every call, as in transformers' forward pass."""
    model, seen = tiny_mamba(), []
    for name in ("in_proj", "x_proj", "out_proj"):
        module = getattr(mixers(model)[0], name)
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-1]) or 2 * output)
    expected = loss_and_gradients(model, False, **token_batch())
    stock = list(seen)
    found = loss_and_gradients(model, True, **token_batch())
    assert seen == 2 * stock and len(fused_calls) == 2
    require_equal(found, expected, 1e-4)


def test_a_class_without_a_known_mask_is_left_alone() -> None:
    def forward(self, hidden_states):
        return hidden_states + 1

    replaced = mixer_switch.mixer_replacement(forward, SingleForm())
    with hf_compressm.fast_cpu_scan():
        assert torch.equal(replaced(nn.Identity(), torch.zeros(1, 2, 3)), torch.ones(1, 2, 3))
