"""Single steps of a Mamba mixer from the model's own cache: when they are fused, and that nothing else changes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

import hf_compressm
from hf_compressm.architectures import find_layers
from hf_compressm.architectures.scans import mixer as mixer_switch
from hf_compressm.ops import selective_scan_reference
from tests.cases import tiny_mamba, token_batch
from tests.selective_models import tiny_falcon_mamba, tiny_jamba

BUILD = {"mamba": tiny_mamba, "falcon_mamba": tiny_falcon_mamba, "jamba": tiny_jamba}
families = pytest.mark.parametrize("family", BUILD)
LAYERS, PROMPT, LENGTH = 2, 6, 14
STEPS = LENGTH - PROMPT
# What transformers has called the cache of a model.
CACHE_NAMES = ("cache", "cache_params", "past_key_values")


@pytest.fixture
def fused_steps(monkeypatch):
    """The shapes of the states that the fused step has written."""
    calls = []
    real = mixer_switch.selective_step

    def counted(state, *args, **kwargs):
        calls.append(tuple(state.shape))
        return real(state, *args, **kwargs)

    monkeypatch.setattr(mixer_switch, "selective_step", counted)
    return calls


def cache_name(model: nn.Module) -> str:
    return next(name for name in CACHE_NAMES if name in inspect.signature(type(model).forward).parameters)


def states_of(cache: Any) -> list[Tensor]:
    """All that a cache holds of the mixers' layers."""
    layers = [layer for layer in cache.layers if getattr(layer, "recurrent_states", {}).get(0) is not None]
    return [held[0] for layer in layers for held in (layer.conv_states, layer.recurrent_states)]


def step_by_step(model: nn.Module, fast: dict[int, bool], batch: int = 3) -> tuple[Tensor, list[Tensor]]:
    """
    The logits of a prompt and of one token after the other, and the states after them.

    `fast` says for each first token from which on the switch is on or off.
    """
    ids, cache, logits = token_batch(batch, LENGTH)["input_ids"], DynamicCache(config=model.config), []
    for first, last in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))):
        is_fast = fast[max(start for start in fast if start <= first)]
        with hf_compressm.fast_cpu_scan(is_fast), torch.no_grad():
            logits.append(model(ids[:, first:last], use_cache=True, **{cache_name(model): cache}).logits)
    return torch.cat(logits, dim=1), states_of(cache)


def require_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    for value, wanted in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert value.dtype == wanted.dtype
        assert (value - wanted).double().norm() <= tolerance * wanted.double().norm()


@families
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "fast", [{0: True}, {0: True, PROMPT: False}, {0: False, PROMPT: True}, {0: False, 8: True, 11: False}], ids=str
)
def test_logits_and_states_are_those_of_transformers_whoever_took_the_steps_before(
    family, batch, fast, fused_steps
) -> None:
    model = BUILD[family]().eval()
    expected = step_by_step(model, {0: False}, batch)
    assert not fused_steps
    found = step_by_step(model, fast, batch)
    steps = sum(fast[max(start for start in fast if start <= t)] for t in range(PROMPT, LENGTH))
    assert fused_steps == steps * LAYERS * [(batch, 32, 8)]
    require_same(found, expected, 1e-4)


@families
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_with_padding_are_those_of_transformers(family, beams, fused_steps) -> None:
    model = BUILD[family]().eval()
    ids, mask = token_batch(3, PROMPT)["input_ids"], torch.ones(3, PROMPT, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    settings = {
        "attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(ids, **settings)
    assert not fused_steps
    with hf_compressm.fast_cpu_scan():
        found = model.generate(ids, **settings)
    # The first of the tokens comes out of the prompt.
    assert fused_steps == (STEPS - 1) * LAYERS * [(3 * beams, 32, 8)]
    assert torch.equal(found.sequences, expected.sequences)
    for logits, wanted in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@families
def test_in_double_precision_it_is_the_same_mathematics(family, monkeypatch, fused_steps) -> None:
    """transformers rounds to single precision on the way; with the reference in its place nothing is rounded."""

    def scan(u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
        around = {"D": D, "z": z.mT, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        y, state = selective_scan_reference(u.mT, dt.mT, A, B.mT, C.mT, **around)
        return (y.mT, state) if return_last_state else y.mT

    def step(state, u, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None):
        steps = (tensor.unsqueeze(1) for tensor in (u, dt))
        around = {"D": D, "z": z.unsqueeze(1), "delta_bias": dt_bias, "delta_softplus": dt_softplus}
        inputs = (tensor.unsqueeze(1) for tensor in (B, C))
        y, after = selective_scan_reference(*steps, A, *inputs, initial_state=state, **around)
        state.copy_(after)
        return y[:, 0]

    model = BUILD[family]().double().eval()
    modeling = sys.modules[type(mixers(model)[0]).__module__]
    monkeypatch.setattr(modeling, "mamba_selective_scan", scan)
    monkeypatch.setattr(modeling, "mamba_selective_state_update", step)
    expected, found = step_by_step(model, {0: False}), step_by_step(model, {0: True})
    assert len(fused_steps) == STEPS * LAYERS and found[1][1].dtype == torch.float64
    # The norms of the other families are computed in single precision by transformers.
    require_same(found, expected, 1e-9 if family == "mamba" else 1e-5)


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "A_log")]


def test_layers_that_are_cut_and_mix_states_take_it_too(fused_steps) -> None:
    model = tiny_falcon_mamba()
    config = hf_compressm.CompreSSMConfig(strategy="fixed", keep_ratio=0.5, fast_cpu_scan=False)
    hf_compressm.compress(model, [token_batch()], config)
    model.eval()
    require_same(step_by_step(model, {0: True}), step_by_step(model, {0: False}), 1e-4)
    assert fused_steps == STEPS * LAYERS * [(3, 32, 4)]


@pytest.mark.parametrize("taps", [2, 3])
def test_other_filters_without_a_bias(taps, fused_steps) -> None:
    model = tiny_mamba(conv_kernel=taps, use_conv_bias=False).eval()
    require_same(step_by_step(model, {0: True}), step_by_step(model, {0: False}), 1e-4)
    assert len(fused_steps) == STEPS * LAYERS


# ---- one mixer


@pytest.fixture
def begun():
    """Makes a mixer and a cache that has seen some tokens, the same each time."""

    def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, DynamicCache, Tensor]:
        model = tiny_mamba().to(dtype).eval()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(token_batch(2, PROMPT)["input_ids"], use_cache=True, **{cache_name(model): cache})
        return mixers(model)[0], cache, torch.linspace(-1, 1, 32).view(2, 1, 16).to(dtype)

    return make


def step(mixer: nn.Module, cache: DynamicCache, x: Tensor, fast: bool, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    with hf_compressm.fast_cpu_scan(fast):
        output = mixer(x, **{cache_name(mixer): cache}, **kwargs)
    return output.detach(), states_of(cache)


def test_a_mask_of_the_new_token(begun, fused_steps) -> None:
    mask = torch.tensor([[1], [0]])
    with torch.no_grad():
        expected, found = (step(*begun(), fast, attention_mask=mask) for fast in (False, True))
    assert len(fused_steps) == 1
    require_same(found, expected, 1e-4)


def test_the_cache_is_written_in_place(begun, fused_steps) -> None:
    mixer, cache, x = begun()
    before = states_of(cache)
    copies = [state.clone() for state in before]
    with torch.no_grad():
        _, after = step(mixer, cache, x, True)
    assert len(fused_steps) == 1 and all(new is old for new, old in zip(after, before))
    # Those of the first layer, and not of the second.
    changed = [not torch.equal(old, copy) for old, copy in zip(after, copies)]
    assert changed == [True, True, False, False]


def test_modules_that_are_called_see_the_step(begun, fused_steps) -> None:
    results = []
    for fast in (False, True):
        mixer, cache, x = begun()
        seen = []
        for name in ("in_proj", "x_proj", "out_proj"):
            hook = lambda _, inputs, output: seen.append(tuple(output.shape)) or 2 * output  # noqa: E731, B023
            getattr(mixer, name).register_forward_hook(hook)
        with torch.no_grad():
            results.append((step(mixer, cache, x, fast), seen))
    assert len(fused_steps) == 1 and results[0][1] == results[1][1]
    require_same(results[1][0], results[0][0], 1e-4)


# ---- what is for transformers' own step


def left_alone(
    begun, fused_steps, change=lambda mixer, cache: None, dtype=torch.float32, context=torch.no_grad
) -> None:
    results = []
    for fast in (False, True):
        mixer, cache, x = begun(dtype)
        change(mixer, cache)
        with context():
            results.append(step(mixer, cache, x, fast))
    assert not fused_steps
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    require_same(results[1], results[0], tolerance)


def test_with_gradients(begun, fused_steps) -> None:
    left_alone(begun, fused_steps, context=torch.enable_grad)


def test_states_that_a_graph_has_made(begun, fused_steps) -> None:
    def change(mixer: nn.Module, cache: DynamicCache) -> None:
        cache.layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].clone().requires_grad_()

    left_alone(begun, fused_steps, change)


def test_half_precision(begun, fused_steps) -> None:
    left_alone(begun, fused_steps, dtype=torch.bfloat16)


@contextmanager
def autocast_without_gradients() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def test_autocast(begun, fused_steps) -> None:
    left_alone(begun, fused_steps, context=autocast_without_gradients)


def _record(mixer: nn.Module, cache: DynamicCache) -> None:
    cache.layers[0].activate_past_recording()


def _other_dtype(mixer: nn.Module, cache: DynamicCache) -> None:
    cache.layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].bfloat16()


def _gaps(mixer: nn.Module, cache: DynamicCache) -> None:
    cache.layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].mT.contiguous().mT


def _reset(mixer: nn.Module, cache: DynamicCache) -> None:
    cache.reset()


@pytest.mark.parametrize("change", [_record, _other_dtype, _gaps, _reset])
def test_a_cache_that_is_not_quite_as_expected(change, begun, fused_steps) -> None:
    left_alone(begun, fused_steps, change)


def test_several_tokens_at_once(begun, fused_steps) -> None:
    results = []
    for fast in (False, True):
        mixer, cache, x = begun()
        with torch.no_grad():
            results.append(step(mixer, cache, F.pad(x, (0, 0, 0, 3)), fast))
    assert not fused_steps
    require_same(*reversed(results), 1e-4)


def test_another_batch_size_raises_what_transformers_raises(begun, fused_steps) -> None:
    for fast in (False, True):
        mixer, cache, x = begun()
        with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            step(mixer, cache, x[:1], fast)
    assert not fused_steps


def test_an_observed_step_shows_its_scan_or_none(begun, fused_steps) -> None:
    mixer, cache, x = begun()

    class Watcher:
        def observe(self, inputs, output):
            return output

    holder = nn.ModuleList([mixer])
    with find_layers(holder)[0].observed(Watcher()), torch.no_grad():
        step(mixer, cache, x, True)
    assert not fused_steps
