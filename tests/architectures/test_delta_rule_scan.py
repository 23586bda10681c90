"""The delta rule in transformers' models: fast, observed, and out of the way where it does not know what is asked."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from hf_compressm import fast_cpu_scan
from hf_compressm.architectures import DeltaRuleInputs
from hf_compressm.architectures.scans import delta_rule as delta_rule_switch
from hf_compressm.architectures.scans import switch
from hf_compressm.compression.measure.observers import AveragedObserver, LossGradientObserver
from hf_compressm.errors import CalibrationError, DimensionError
from tests.delta_rule_models import CONFIGS, HEADS, KEY_DIM, KEY_HEADS, delta_layers, tiny_delta_rule_model

NAMES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """All families' modules are registered while a test runs, and the stock functions are back after it."""
    monkeypatch.setattr(switch, "_replacements", dict(switch._replacements))
    modules = [sys.modules[type(delta_layers(tiny_delta_rule_model(name))[0]).__module__] for name in CONFIGS]
    before = [{name: getattr(module, name, None) for name in NAMES} for module in modules]
    for module in modules:
        delta_rule_switch.register_delta_rule(module.__name__)
    yield
    assert [{name: getattr(module, name, None) for name in NAMES} for module in modules] == before


@pytest.fixture
def fast_calls(monkeypatch) -> list[int]:
    calls = []
    real = delta_rule_switch.delta_rule

    def counted(*args: Tensor):
        calls.append(args[0].shape[1])
        return real(*args)

    monkeypatch.setattr(delta_rule_switch, "delta_rule", counted)
    return calls


def batch(length: int = 21) -> Tensor:
    return torch.randint(3, 20, (2, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, **inputs) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(input_ids=batch(), labels=batch(), use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_rule_gives_the_same_loss_and_gradients(name: str, fast_calls) -> None:
    model = tiny_delta_rule_model(name).train()
    expected, gradients = loss_and_gradients(model)
    assert not fast_calls
    with fast_cpu_scan():
        found, others = loss_and_gradients(model)
    assert fast_calls == [21, 21]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(others, gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_goes_on_from_the_fast_rule(name: str, fast_calls) -> None:
    """A prefill, more tokens at once on its cache, and single steps after them."""
    model = tiny_delta_rule_model(name)
    whole = model(input_ids=batch(), use_cache=False).logits
    with fast_cpu_scan(), torch.no_grad():
        pieces, cache = [], None
        for piece in batch().split([9, 11, 1], dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            cache = out.past_key_values
    assert fast_calls == [9, 9, 11, 11]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)
    with fast_cpu_scan():
        found = model.generate(batch(), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(batch(), max_new_tokens=4, do_sample=False))


class Look:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[DeltaRuleInputs, Tensor]] = []

    def observe(self, inputs: DeltaRuleInputs, output: Tensor) -> Tensor:
        self.seen.append((inputs, output))
        return output


def observed_layer(name: str, fast: bool = False, **inputs):
    model, look = tiny_delta_rule_model(name), Look()
    with switch.watching(delta_layers(model)[0], look), fast_cpu_scan(fast):
        model(**{"input_ids": batch(), "use_cache": False, **inputs})
    ((inputs, output),) = look.seen
    return model, inputs, output


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_observed_is_the_rule(name: str, fast: bool) -> None:
    """The reference, run on the observed arguments, gives the observed output."""
    _, inputs, output = observed_layer(name, fast)
    inputs = inputs.shared_by(KEY_HEADS)
    heads = KEY_HEADS if name == "kimi_linear" else HEADS
    assert inputs.B.shape == inputs.C.shape == (2, 21, KEY_HEADS, KEY_DIM)
    assert inputs.log_decay.ndim == (4 if name == "kimi_linear" else 3) and inputs.mask is None
    assert inputs.states_per_sequence == inputs.u[0, 0].numel() * KEY_DIM
    assert inputs.rows == 2 * 21 * heads // KEY_HEADS * inputs.u.shape[-1]
    expected, _ = delta_rule_switch.delta_rule(inputs.C, inputs.B, inputs.u, inputs.log_decay, inputs.beta)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_the_repeated_keys_of_older_versions_are_taken_together() -> None:
    _, inputs, _ = observed_layer("qwen3_next")
    inputs = inputs.shared_by(KEY_HEADS)
    repeated = DeltaRuleInputs(
        inputs.u, inputs.log_decay, inputs.beta, *(x.repeat_interleave(2, dim=2) for x in (inputs.B, inputs.C))
    )
    again = repeated.shared_by(KEY_HEADS)
    assert torch.equal(again.B, inputs.B) and torch.equal(again.C, inputs.C)
    times = torch.arange(21).expand(2, -1)
    P, apart = (x.detached().state_gramian(times)[0] for x in (inputs, repeated))
    torch.testing.assert_close(P, apart.unflatten(0, (KEY_HEADS, -1)).sum(1), rtol=1e-5, atol=1e-9)
    with pytest.raises(DimensionError, match="3 key heads"):
        inputs.shared_by(3)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(name: str, side: str) -> None:
    mask = torch.ones(2, 21, dtype=torch.long)
    padded = slice(0, 8) if side == "left" else slice(13, 21)
    mask[1, padded] = 0
    _, inputs, _ = observed_layer(name, attention_mask=mask)
    # The convolution carries the end of a sequence three steps on.
    counted = 13 if side == "left" else 16
    assert inputs.mask.sum(1).tolist() == [21, counted] and inputs.steps == 21 + counted
    single = tiny_delta_rule_model(name), Look()
    rows = batch()[1:, 8:] if side == "left" else batch()[1:, :16]
    with switch.watching(delta_layers(single[0])[0], single[1]):
        single[0](input_ids=rows, use_cache=False)
    alone = single[1].seen[0][0].detached()
    times = torch.arange(21).expand(2, -1)
    P, _ = inputs.detached().state_gramian(times)
    first = DeltaRuleInputs(*(x[:1].detach() for x in (inputs.u, inputs.log_decay, inputs.beta, inputs.B, inputs.C)))
    expected = first.state_gramian(times[:1])[0]
    if side == "left":
        expected = expected + alone.state_gramian(torch.arange(13)[None])[0]
        torch.testing.assert_close(P, expected, rtol=1e-3, atol=1e-6)
        R = (first.readout_gramian() * 21 + alone.readout_gramian() * 13) / 34
        torch.testing.assert_close(inputs.readout_gramian(), R, rtol=1e-3, atol=1e-6)
    assert bool((torch.linalg.eigvalsh(P - expected).amin(-1) >= -1e-4 * P.diagonal(dim1=1, dim2=2).sum(-1)).all())


class _ByKeyHead(LossGradientObserver):
    """As a family watches its layers, whatever the version of transformers hands to the rule."""

    def observe(self, inputs: DeltaRuleInputs, output: Tensor) -> Tensor:
        return super().observe(inputs.shared_by(KEY_HEADS), output)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_loss_gradient_observer_measures_both_gramians(name: str, fast: bool) -> None:
    """Against states and their gradients by autograd, through a rule that is written out step by step."""
    model = tiny_delta_rule_model(name)
    layer = delta_layers(model)[0]
    trigger = torch.zeros((), requires_grad=True)
    observer = _ByKeyHead(torch.Generator().manual_seed(0), trigger)
    with switch.watching(layer, observer), fast_cpu_scan(fast):
        loss = model(input_ids=batch(), labels=batch(), use_cache=False).loss
        observer.loss_terms = 40
        torch.autograd.grad(2.0**12 * loss, trigger)
    found = observer.result("layer", lambda total: total)

    states = []

    def written_out(query, key, value, g, beta, **_):
        inputs = delta_rule_switch._inputs_of(query, key, value, g, beta, True, observed=False)
        shared = value.shape[2] // key.shape[2]
        q, k = (x.repeat_interleave(shared, dim=2) for x in (inputs.C, inputs.B))
        decay = (g if g.ndim == 4 else g[..., None]).exp()[..., None]
        state, outputs = value.new_zeros(2, value.shape[2], KEY_DIM, value.shape[3]), []
        for t in range(value.shape[1]):
            state = decay[:, t] * state
            delta = beta[:, t, :, None] * (value[:, t] - (state * k[:, t, ..., None]).sum(2))
            state = state + k[:, t, ..., None] * delta[:, :, None]
            state.retain_grad()
            states.append(state)
            outputs.append((state * q[:, t, ..., None]).sum(2))
        return torch.stack(outputs, 1), None

    stock, namespace = {}, vars(sys.modules[type(layer).__module__])
    for function in set(NAMES) & set(namespace):
        stock[function], namespace[function] = namespace[function], written_out
    try:
        (40 * model(input_ids=batch(), labels=batch(), use_cache=False).loss).backward()
    finally:
        namespace.update(stock)
    states = states[:21]

    # The observer's samples, by the same generator; sixteen of 21 steps.
    probe = DeltaRuleInputs(torch.zeros(2, 21, 4, 1), *[torch.zeros(0)] * 2, *[torch.zeros(1, 1, 1, KEY_DIM)] * 2)
    times = probe.sample_times(torch.Generator().manual_seed(0))
    assert times.shape == (2, 16)
    for matrices, measured in ((states, found.P), ([s.grad for s in states], found.Q)):
        picked = [torch.stack([matrices[t][b] for t in times[b].tolist()]).double() for b in range(2)]
        rows = torch.stack(picked).unflatten(2, (KEY_HEADS, -1))
        expected = (
            torch.einsum("bthsnv,bthsmv->hnm", rows, rows) * (21 / 16) / (2 * 21 * rows[0, 0, 0].numel() / KEY_DIM)
        )
        torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_there_is_no_average_of_a_delta_rule() -> None:
    _, inputs, output = observed_layer("qwen3_next")
    with pytest.raises(CalibrationError, match="no means over time"):
        AveragedObserver().observe(inputs, output)


def arguments(length: int = 6) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    vectors = [torch.randn(2, length, 2, 4) for _ in range(3)]
    return (*vectors, -torch.rand(2, length, 2), torch.rand(2, length, 2))


def test_what_the_fast_rule_does_not_know_goes_to_the_stock_function(fast_calls) -> None:
    """Packed rows, other devices, transforms, compilation, subclasses of tensors: with all their arguments."""
    asked = []

    def stock(query, key, value, g, beta, **kwargs):
        asked.append(kwargs)
        return value, None

    rule = delta_rule_switch.delta_rule_replacement(stock)
    given = arguments()
    rule(*given, initial_state=None, use_qk_l2norm_in_kernel=True, cu_seqlens=None, anything=3)
    assert asked == [
        {
            "chunk_size": 64, "initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True,
            "cu_seqlens": None, "anything": 3,
        }
    ]  # fmt: skip
    with fast_cpu_scan():
        rule(*given, cu_seqlens=torch.tensor([0, 3, 6]))
        rule(*(x.to("meta") for x in given))
        torch.func.vmap(lambda q: rule(q[None], *(x[:1] for x in given[1:]))[0])(given[0])
        assert len(asked) == 4 and not fast_calls
        output, state = rule(*given)
        assert fast_calls == [6] and state is None
        assert rule(*given, output_final_state=True)[1].shape == (2, 2, 4, 4)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_transforms_and_second_derivatives_are_those_of_the_stock_model(name: str) -> None:
    model = tiny_delta_rule_model(name)
    layer = delta_layers(model)[0]
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))

    def size(hidden: Tensor) -> Tensor:
        return layer(hidden).square().sum()

    def penalty() -> Tensor:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(size(leaf), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    ways = [penalty, lambda: torch.func.grad(size)(x), lambda: torch.func.jvp(size, (x,), (torch.ones_like(x),))[1]]
    expected = [way() for way in ways]
    with fast_cpu_scan():
        for way, value in zip(ways, expected):
            torch.testing.assert_close(way(), value, rtol=1e-3, atol=1e-6)


def test_packed_rows_are_observed_with_a_warning(monkeypatch, caplog) -> None:
    switch.warn_of_packing.cache_clear()
    look = Look()
    monkeypatch.setattr(delta_rule_switch, "current_observer", lambda: look)
    rule = delta_rule_switch.delta_rule_replacement(lambda query, key, value, **_: (value, None))
    rule(*arguments(), cu_seqlens=torch.tensor([0, 3, 6]))
    assert len(look.seen) == 1 and "packed" in caplog.text


def test_the_norm_is_that_of_the_stock_functions() -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import l2norm as divided
    from transformers.models.qwen3_next.modeling_qwen3_next import l2norm as multiplied

    query, key, value, g, beta = arguments()
    inputs = delta_rule_switch._inputs_of(query, key * 1e-3, value, g, beta, True, observed=False)
    for norm in (divided, multiplied):
        torch.testing.assert_close(inputs.B, norm(key * 1e-3))
        torch.testing.assert_close(inputs.C, norm(query) * 4**-0.5)


def test_short_types_come_back_as_they_came() -> None:
    given = [x.bfloat16() for x in arguments()]
    rule = delta_rule_switch.delta_rule_replacement(lambda *_, **__: pytest.fail("the stock function was called"))
    with fast_cpu_scan():
        output, state = rule(*given, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
