"""The switch: what it replaces, when it stays out of the way, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import sys
import threading
import types

import pytest
import torch
from torch import nn
from transformers.models.mamba import modeling_mamba

import hf_compressm
from hf_compressm.architectures import fast_cpu_scan_enabled, find_layers
from hf_compressm.architectures.scans import selective as selective_scan_switch
from hf_compressm.architectures.scans import switch
from hf_compressm.errors import ConfigurationError
from tests.cases import logits_of, tiny_mamba, token_batch
from tests.selective_models import tiny_bamba, tiny_falcon_mamba, tiny_jamba, tiny_mamba2, tiny_zamba

NAMES = ("mamba_selective_scan", "mamba_inner_fn")
STOCK = {name: getattr(modeling_mamba, name) for name in NAMES}


def is_stock() -> bool:
    return all(getattr(modeling_mamba, name) is STOCK[name] for name in NAMES) and not fast_cpu_scan_enabled()


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    assert is_stock()
    yield
    hf_compressm.disable_fast_cpu_scan()
    assert is_stock()


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    real = selective_scan_switch.selective_scan

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(selective_scan_switch, "selective_scan", counted)
    return calls


def test_the_context_switches_on_and_off(fused_calls) -> None:
    model, batch = tiny_mamba(), token_batch()
    logits_of(model, batch)
    assert not fused_calls
    with hf_compressm.fast_cpu_scan():
        assert fast_cpu_scan_enabled() and not is_stock()
        logits_of(model, batch)
        assert len(fused_calls) == 2
    assert is_stock()
    with hf_compressm.fast_cpu_scan(False):
        assert is_stock()


def test_contexts_nest_and_go_along_with_the_permanent_switch() -> None:
    with hf_compressm.fast_cpu_scan():
        with hf_compressm.fast_cpu_scan():
            pass
        assert fast_cpu_scan_enabled()
        hf_compressm.enable_fast_cpu_scan()
        hf_compressm.enable_fast_cpu_scan()
    assert fast_cpu_scan_enabled()
    hf_compressm.disable_fast_cpu_scan()
    assert is_stock()
    hf_compressm.disable_fast_cpu_scan()
    assert is_stock()


def test_an_exception_switches_off() -> None:
    with pytest.raises(RuntimeError), hf_compressm.fast_cpu_scan():
        raise RuntimeError
    assert is_stock()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_and_gradients_are_those_of_the_stock_path(
    dtype: torch.dtype, tolerance: float, use_cache: bool
) -> None:
    results = []
    for fast in (False, True):
        model = tiny_mamba().to(dtype).train(not use_cache)
        with hf_compressm.fast_cpu_scan(fast):
            output = model(**token_batch(), use_cache=use_cache)
            output.loss.backward()
        results.append([output.logits, *(parameter.grad for parameter in model.parameters())])
        assert all(tensor.dtype == dtype for tensor in results[-1][1:])
    for stock, fused in zip(*results):
        error = (stock.float() - fused.float()).norm() / stock.float().norm().clamp_min(1e-12)
        assert error < 10 * tolerance, float(error)


def test_generation_and_its_cache_are_those_of_the_stock_path(fused_calls) -> None:
    model, prompt = tiny_mamba(), token_batch(batch=2, length=7)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(prompt, **settings)
    with hf_compressm.fast_cpu_scan():
        assert torch.equal(model.generate(prompt, **settings), stock)
    assert len(fused_calls) == 2, "the prompt goes through the fused scan, single steps do not"


def test_padding_is_masked_as_in_the_stock_path() -> None:
    model, batch = tiny_mamba(), token_batch()
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[0, :7] = mask[2, :15] = 0
    batch = {"input_ids": batch["input_ids"], "attention_mask": mask}
    stock = logits_of(model, batch)
    with hf_compressm.fast_cpu_scan():
        torch.testing.assert_close(logits_of(model, batch), stock, rtol=1e-4, atol=1e-5)


def test_torch_compile_and_export_keep_the_stock_path(fused_calls) -> None:
    model, batch = tiny_mamba().eval(), token_batch()
    stock = logits_of(model, batch)
    with hf_compressm.fast_cpu_scan(), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        out = compiled(batch["input_ids"], use_cache=False).logits
    assert not fused_calls
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{"seq_idx": torch.zeros(1)}, {"cu_seqlens": torch.zeros(1)}])
def test_packed_sequences_are_left_to_the_stock_path(extra: dict, fused_calls) -> None:
    u = torch.rand(2, 4, 6)
    A, B = -torch.rand(4, 3), torch.rand(2, 3, 6)
    # Newer transformers refuse packed sequences without mamba-ssm, 5.17 runs its reference on them.
    with hf_compressm.fast_cpu_scan(), contextlib.suppress(ValueError):
        modeling_mamba.mamba_selective_scan(u, u, A, B, B, **extra)
    assert not fused_calls


def test_the_stock_function_is_called_with_what_it_was_given(monkeypatch) -> None:
    """Arguments that the fused scan does not take reach the stock function unchanged."""
    seen = {}

    def stock(*args, **kwargs):
        seen.update(kwargs, positional=len(args))
        return "stock"

    replacement = selective_scan_switch.selective_scan_replacement(stock)
    tensors = [torch.zeros(1, 2, 3)] * 5
    assert replacement(*tensors, delta_softplus=True, use_mambapy=True) == "stock"
    assert seen["delta_softplus"] and seen["use_mambapy"] and seen["positional"] == 5


def test_a_subclass_written_elsewhere_is_watched_where_its_forward_was_written() -> None:
    class Mine(modeling_mamba.MambaMixer):
        pass

    model = tiny_mamba()
    model.backbone.layers[0].mixer.__class__ = Mine
    assert [layer.name for layer in find_layers(model)] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]


def test_a_mixer_whose_forward_calls_no_known_scan_is_not_taken_for_a_mamba() -> None:
    class Own(modeling_mamba.MambaMixer):
        forward = nn.Identity.forward

    model = tiny_mamba()
    model.backbone.layers[0].mixer.__class__ = Own
    assert [layer.name for layer in find_layers(model)] == ["backbone.layers.1.mixer"]


def test_observers_of_two_threads_do_not_meet() -> None:
    """Each thread's observer sees its own layer only."""
    seen = {0: [], 1: []}

    def run(number: int) -> None:
        model = tiny_mamba(seed=number)
        layer = find_layers(model)[0]

        class Watcher:
            def observe(self, inputs, output):
                seen[number].append(inputs.u.shape[0])
                return output

        with layer.observed(Watcher()):
            for _ in range(5):
                logits_of(model, token_batch(batch=number + 1))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: [1] * 5, 1: [2] * 5}


def replacement_that_says(word: str):
    return lambda stock: lambda: f"{word} for {stock()}"


@pytest.fixture
def two_modules(monkeypatch):
    """Two families whose modules both call a function `scan`, each known with a replacement of its own."""
    modules = [types.ModuleType(name) for name in ("first_family", "second_family")]
    monkeypatch.setattr(switch, "_replacements", dict(switch._replacements))
    for module in modules:
        exec(f"def scan(): return '{module.__name__}'", vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        switch.register_scan(module.__name__, {"scan": replacement_that_says(f"ours of {module.__name__}")})
    return modules


def test_equal_names_in_two_modules_keep_their_own_replacements(two_modules) -> None:
    names = [module.__name__ for module in two_modules]
    with hf_compressm.fast_cpu_scan():
        assert [module.scan() for module in two_modules] == [f"ours of {name} for {name}" for name in names]
    assert [module.scan() for module in two_modules] == names


def test_a_second_replacement_of_one_name_in_one_module_is_refused(two_modules) -> None:
    with pytest.raises(ConfigurationError, match="first_family.scan is already replaced by"):
        switch.register_scan("first_family", {"scan": replacement_that_says("another")})
    with hf_compressm.fast_cpu_scan():
        assert two_modules[0].scan() == "ours of first_family for first_family"


def model_penalty(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a gradient penalty."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    score = model(inputs_embeds=embeds, use_cache=False).logits.logsumexp(-1).mean()
    (slope,) = torch.autograd.grad(score, embeds, create_graph=True)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((slope.norm() - 1) ** 2, parameters, materialize_grads=True)))


def model_functional(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient by `torch.func`."""

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (ids,), {"use_cache": False}).logits.logsumexp(-1).mean()

    return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


def model_tangent(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A directional derivative by dual numbers."""
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeds, torch.ones_like(embeds))
        logits = model(inputs_embeds=dual, use_cache=False).logits
        return {"tangent": torch.autograd.forward_ad.unpack_dual(logits).tangent}


@pytest.mark.parametrize("derivative", [model_penalty, model_functional, model_tangent], ids=lambda d: d.__name__)
@pytest.mark.parametrize("build", [tiny_mamba, tiny_falcon_mamba, tiny_jamba, tiny_zamba, tiny_mamba2, tiny_bamba])
def test_every_derivative_of_a_model_is_that_of_the_stock_path(build, derivative) -> None:
    model, ids = build().eval(), token_batch(batch=2, length=12)["input_ids"]
    model.set_attn_implementation("eager")  # the fused attention has no such derivatives
    expected = derivative(model, ids)
    with hf_compressm.fast_cpu_scan():
        found = derivative(model, ids)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-8, msg=name)


def test_tracing_records_the_stock_path(fused_calls) -> None:
    """A kernel behind numpy would be a constant of the traced graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    u = torch.rand(2, 4, 6)
    A, B = -torch.rand(4, 3), torch.rand(2, 3, 6)
    with hf_compressm.fast_cpu_scan():
        graph = make_fx(lambda x: modeling_mamba.mamba_selective_scan(x, u, A, B, B))(u.clone())
    assert not fused_calls
    torch.testing.assert_close(graph(2 * u), modeling_mamba.mamba_selective_scan(2 * u, u, A, B, B))
