"""Compressed models: what stock classes cannot hold, built, run, copied, saved and loaded."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, PreTrainedModel

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.errors import InconsistentModelError, UnsupportedModelError
from hf_compressm.hub import load_model
from hf_compressm.models.compressed import compressed_config_class, compressed_model_class
from hf_compressm.models.compressed.mixing import mix
from tests import selective_models
from tests.architectures.families.test_all_families import recurrent_states
from tests.cases import logits_of, tiny_mamba
from tests.delta_rule_models import GATED_CONFIGS, KIMI_CONFIGS, tiny_gated_delta_net, tiny_kimi_delta
from tests.lightning_models import tiny_minimax
from tests.models.test_remote_code import WITHOUT_THE_LIBRARY

N, HALF, LENGTH = 8, 4, 11
MULTI_HEAD = ("mamba2", "zamba2", "bamba", "falcon_h1", "granite_moe_hybrid", "nemotron_h")
MIXED = (*MULTI_HEAD, "falcon_mamba", "jamba", *GATED_CONFIGS, *KIMI_CONFIGS, "minimax")
every_mixed = pytest.mark.parametrize("family", MIXED)


def build(family: str, **overrides) -> PreTrainedModel:
    if family in GATED_CONFIGS:
        return tiny_gated_delta_net(family, N, **overrides)
    if family in KIMI_CONFIGS:
        return tiny_kimi_delta(family, **overrides)
    if family == "minimax":
        return tiny_minimax(**overrides)
    maker = tiny_mamba if family == "mamba" else getattr(selective_models, f"tiny_{family}")
    return maker(N, **overrides).eval()


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    # Without 0, which stands for padding in generation.
    return torch.randint(1, selective_models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def labelled() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def cut(family: str, size: int = HALF, fit_readout: bool | None = None, **overrides) -> PreTrainedModel:
    """A model whose layers are mixed, by a cut to `size` states."""
    model = build(family, **overrides)
    config = CompreSSMConfig(strategy="fixed", keep_ratio=size / N, fit_readout=fit_readout)
    assert compress(model, [labelled()], config, progress=False).outcome == "cut"
    return model.eval()


def recurrent_bytes(model: nn.Module) -> int:
    """The memory that the recurrent states of a cache take, as their storages tell."""
    return sum(state.untyped_storage().nbytes() for state in recurrent_states(model, tokens()))


@pytest.mark.parametrize(
    "family, overrides", [*((family, {}) for family in MIXED), ("falcon_h1", {"mamba_rms_norm": True})], ids=str
)
def test_mixing_with_the_identity_is_the_stock_model(family: str, overrides: dict) -> None:
    model = build(family, **overrides)
    mixed = copy.deepcopy(model)
    for layer in find_layers(mixed):
        mix(layer.module, N)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    for inputs in (
        {"input_ids": tokens(), "use_cache": False},
        {"input_ids": tokens(), "use_cache": True},
        {"input_ids": tokens(), "attention_mask": mask, "use_cache": False},
    ):
        torch.testing.assert_close(logits_of(mixed, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)
    generated = [m.generate(tokens(), max_new_tokens=5, do_sample=False) for m in (model, mixed)]
    assert torch.equal(*generated)
    for each in (model, mixed):
        each.train()
        each(**labelled(), use_cache=False).loss.backward()
    stock = dict(model.named_parameters())
    for name, parameter in mixed.named_parameters():
        if name in stock and stock[name].grad is not None:
            torch.testing.assert_close(parameter.grad, stock[name].grad, rtol=1e-4, atol=1e-5)
        elif name.endswith("mixing"):
            assert parameter.grad.abs().max() > 0


def mixed_output_by_a_plain_loop(mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What a mixed Mamba-2 mixer gives its norm (output and gate), one step after the other, in float64."""
    P = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    inner, groups, heads = mixer.intermediate_size, mixer.n_groups, mixer.num_heads
    width = groups * mixer.ssm_state_size
    projected = hidden.double() @ P["in_proj.weight"].T + P.get("in_proj.bias", 0.0)
    gate, driven, dt = projected.split([inner, inner + 2 * width, heads], -1)
    kernel = P["conv1d.weight"][:, 0]
    padded = torch.cat([driven.new_zeros(len(hidden), kernel.shape[1] - 1, driven.shape[-1]), driven], 1)
    driven = sum(padded[:, k : k + hidden.shape[1]] * kernel[:, k] for k in range(kernel.shape[1]))
    u, B, C = nn.functional.silu(driven + P["conv1d.bias"]).split([inner, width, width], -1)
    dt = nn.functional.softplus(dt + P["dt_bias"]).clamp(*mixer.time_step_limit)
    r = P["input_mixing"].shape[-1]
    outputs = []
    state = u.new_zeros(len(hidden), heads, inner // heads, r)
    for t in range(hidden.shape[1]):
        rows = []
        for head in range(heads):
            group = head * groups // heads
            entries = slice(group * mixer.ssm_state_size, (group + 1) * mixer.ssm_state_size)
            b, c = B[:, t, entries] @ P["input_mixing"][group], C[:, t, entries] @ P["readout_mixing"][group]
            x = u[:, t].unflatten(-1, (heads, -1))[:, head]
            decay = torch.exp(-dt[:, t, head] * P["A_log"][head].exp())[:, None, None]
            new = decay * state[:, head] + dt[:, t, head, None, None] * x[:, :, None] * b[:, None, :]
            state = torch.cat([state[:, :head], new[:, None], state[:, head + 1 :]], 1)
            rows.append(torch.einsum("bpr,br->bp", new, c) + P["D"][head] * x)
        outputs.append(torch.cat(rows, -1))
    return torch.stack(outputs, 1), gate


@torch.no_grad()
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.4)])
def test_a_mixed_layer_computes_its_equations(limit: tuple[float, float]) -> None:
    model = cut("mamba2", time_step_limit=limit)
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(2, 19, 16, generator=torch.Generator().manual_seed(1))
    output, gate = mixed_output_by_a_plain_loop(mixer, hidden)
    found = {}
    mixer.norm.register_forward_pre_hook(lambda _, inputs: found.update(output=inputs[0], gate=inputs[1]))
    mixer(hidden)
    torch.testing.assert_close(found["gate"].double(), gate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["output"].double(), output, rtol=1e-4, atol=1e-5)


@every_mixed
def test_generation_with_the_smaller_cache_is_that_without_one(family: str) -> None:
    stock, model = build(family), cut(family)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(tokens(), **settings)
    assert torch.equal(found, model.generate(tokens(), use_cache=False, **settings))
    expected = tokens()
    for _ in range(6):
        logits = logits_of(model, {"input_ids": expected, "use_cache": False})
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    assert recurrent_bytes(model) * N == recurrent_bytes(stock) * HALF


@torch.no_grad()
def logits_in_pieces(model: nn.Module, first: int = 5) -> Tensor:
    """The logits of a prompt whose last tokens come one by one."""
    outputs = model(input_ids=tokens()[:, :first], use_cache=True)
    # transformers 5.24 calls every cache so.
    name = next(name for name in ("cache", "past_key_values", "cache_params") if name in outputs)
    cache, pieces = outputs[name], [outputs.logits]
    for t in range(first, LENGTH):
        pieces.append(model(input_ids=tokens()[:, t : t + 1], use_cache=True, **{name: cache}).logits)
    return torch.cat(pieces, 1)


@every_mixed
def test_a_prompt_may_come_in_pieces(family: str) -> None:
    """As in the stock model, whose single step does not know `time_step_limit`."""
    stock, mixed = build(family), build(family)
    for layer in find_layers(mixed):
        mix(layer.module, N)
    torch.testing.assert_close(logits_in_pieces(mixed), logits_in_pieces(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "granite_moe_hybrid", "falcon_mamba", "jamba"])
def test_pieces_give_what_the_whole_prompt_gives(family: str) -> None:
    model = cut(family)
    whole = logits_of(model, {"input_ids": tokens(), "use_cache": False})
    torch.testing.assert_close(logits_in_pieces(model), whole, rtol=1e-4, atol=1e-5)


@every_mixed
def test_gradients_are_the_same_with_checkpointing(family: str) -> None:
    model = cut(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        model.zero_grad()
        model(**labelled(), use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert any(name.endswith("mixing") for name in plain)
    torch.testing.assert_close(checkpointed, plain)


@every_mixed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near(family: str, dtype: torch.dtype) -> None:
    model = cut(family)
    expected = logits_of(model, {"input_ids": tokens(), "use_cache": False})
    found = logits_of(model.to(dtype), {"input_ids": tokens(), "use_cache": False})
    assert (found.float() - expected).norm() <= 0.1 * expected.norm()
    assert model.generate(tokens(), max_new_tokens=2, do_sample=False).shape == (2, LENGTH + 2)


@every_mixed
def test_a_second_cut_multiplies_the_matrices_and_nothing_grows(family: str) -> None:
    model = cut(family, 4, fit_readout=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("mixing")}
    count = sum(p.numel() for p in model.parameters())
    config = CompreSSMConfig(strategy="fixed", fit_readout=False)
    assert compress(model, [labelled()], config, progress=False).outcome == "cut"
    after = {name: p for name, p in model.named_parameters() if name.endswith("mixing")}
    assert sum(p.numel() for p in model.parameters()) < count and before.keys() == after.keys()
    names = list(after)
    for W, T in zip(names[::2], names[1::2]):
        assert after[W].shape[-1] == 2
        # The columns stay in the span of the earlier ones, and together they still are a projection.
        for name in (W, T):
            solved = torch.linalg.lstsq(before[name], after[name].detach())
            torch.testing.assert_close(before[name] @ solved.solution, after[name].detach(), rtol=1e-3, atol=1e-4)
        identity = torch.eye(2).expand(*after[W].shape[:-2], 2, 2)
        torch.testing.assert_close(after[W].mT @ after[T], identity, rtol=1e-3, atol=1e-4)


@every_mixed
def test_nothing_is_lost_where_the_dropped_states_are_redundant(family: str) -> None:
    """B and C of every state twice: half of the states carry all there is."""
    model = build(family)
    with torch.no_grad():
        for layer in find_layers(model):
            duplicate_states(layer.module)
    before = logits_of(model, {"input_ids": tokens(), "use_cache": False})
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)
    assert compress(model, [labelled()], config, progress=False).outcome == "cut"
    model.eval()
    for use_cache in (False, True):
        found = logits_of(model, {"input_ids": tokens(), "use_cache": use_cache})
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)


def duplicate_states(mixer: nn.Module) -> None:
    """Let every second state of a mixer do what the one before it does; of Kimi delta attention, hold nothing."""
    if hasattr(mixer, "forget_gate"):
        # A second channel of the same key would erase, too.
        mixer.k_proj.weight[1::2] = 0
        return
    if hasattr(mixer, "qkv_proj"):
        queries_and_keys = mixer.qkv_proj.weight.unflatten(0, (mixer.num_attention_heads, 3, N))[:, :2]
        queries_and_keys[:, :, 1::2] = queries_and_keys[:, :, ::2]
        return
    if hasattr(mixer, "head_k_dim"):
        [layer] = find_layers(mixer)
        kept = torch.arange(0, N, 2).expand(mixer.num_k_heads, -1)
        for axis, parameter in zip(layer.layout.axes, layer.state_parameters().values()):
            parameter[axis.kept(kept + 1, N)] = parameter[axis.kept(kept, N)].clone()
        return
    if mixer.A_log.ndim == 2:
        mixer.A_log[:, 1::2] = mixer.A_log[:, ::2]
        entries = mixer.x_proj.weight[mixer.time_step_rank :]
        entries[1::2] = entries[::2]
        return
    width = mixer.n_groups * mixer.ssm_state_size
    ends = {"in_proj": mixer.in_proj.out_features - mixer.num_heads, "conv1d": mixer.conv1d.out_channels}
    for name, end in ends.items():
        for parameter in getattr(mixer, name).parameters():
            entries = parameter[end - 2 * width : end]
            entries[1::2] = entries[::2]


@every_mixed
def test_copies_and_pickles_are_the_same_model(family: str) -> None:
    model = cut(family)
    inputs = {"input_ids": tokens(), "use_cache": False}
    expected = logits_of(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and type(twin.config) is type(model.config)
        assert torch.equal(logits_of(twin, inputs), expected)


FOLDED = ("mamba", "zamba")

WITH_THE_LIBRARY = """
import sys
import torch, transformers
import hf_compressm.models
assert not any("jamba.modeling" in name for name in sys.modules)
for argument in sys.argv[1:]:
    folder, auto_class = argument.split("::")
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("hf_compressm")
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**saved["inputs"]).logits, saved["logits"], atol=1e-5, rtol=1e-5)
    found = model.generate(saved["inputs"]["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(found, saved["generated"])
    print(type(model).__name__)
"""


def cut_unevenly(family: str) -> PreTrainedModel:
    """A model in whose first layer nothing drives but three states, cut by each layer's own spectrum."""
    model = build(family)
    with torch.no_grad():
        mixer = find_layers(model)[0].module
        weight = mixer.x_proj_weight if family == "zamba" else mixer.x_proj.weight
        weight[..., mixer.time_step_rank + 3 : mixer.time_step_rank + N, :] = 0
    config = CompreSSMConfig(strategy="tolerance", tolerance=1e-3, uniform=False)
    assert compress(model, [labelled()], config, progress=False).outcome == "cut"
    assert [layer.state_size for layer in find_layers(model)] == [3, N]
    return model.eval()


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory) -> list[tuple[str, str]]:
    """Folder and class name of a cut model of each family; without mixing, the layers have sizes of their own."""
    found = []
    for family in (*MIXED, *FOLDED):
        model = cut_unevenly(family) if family in FOLDED else cut(family)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        inputs = {"input_ids": tokens()}
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


def test_the_base_model_and_the_classifier_load_too(saved_folders) -> None:
    folder, name = saved_folders[MIXED.index("jamba")]
    assert name == "CompressedJambaForCausalLM"
    base = transformers.AutoModel.from_pretrained(folder)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert type(base).__name__ == "CompressedJambaModel"
    assert type(classifier).__name__ == "CompressedJambaForSequenceClassification"
    for name, value in base.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])


@pytest.mark.parametrize(
    "sizes, projected, message",
    [
        ([4, 4], None, "both must have"),
        ([4], [8, 8], "both must have"),
        ([0, 4], [8, 8], "from 1 to"),
        ([9, 4], [8, 8], "at most the second"),
        ([4, 4], [8, 10**9], "from 1 to"),
    ],
)
def test_sizes_that_fit_no_model_are_refused(sizes, projected, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressed_config_class(Mamba2Config)(state_sizes=sizes, projected_state_sizes=projected)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"state_sizes": [0, 4]}, UnsupportedModelError, "`state_sizes` 0 and `projected_state_sizes` 8; they must be"),
        ({"state_sizes": [9, 4]}, UnsupportedModelError, "`state_sizes` 9 and `projected_state_sizes` 8; they must be"),
        ({"state_sizes": [-4, 4]}, UnsupportedModelError, "`state_sizes` -4 and"),
        ({"state_sizes": [4]}, UnsupportedModelError, "both must have one number for each"),
        ({"state_sizes": "44"}, UnsupportedModelError, "Validation error for field 'state_sizes'"),
        ({"state_sizes": [4], "projected_state_sizes": [8]}, InconsistentModelError, "has 1 numbers; .* has 2"),
        ({"num_hidden_layers": 3}, InconsistentModelError, "has 2 numbers; .* has 3"),
    ],
)
def test_a_folder_with_sizes_that_fit_no_model_tells_them(changes, error, message: str, tmp_path) -> None:
    cut("mamba2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(error, match=message):
        load_model(tmp_path)


def test_the_number_of_sizes_is_that_of_the_layers() -> None:
    stock = build("mamba2")
    written = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config = compressed_config_class(Mamba2Config)(**written, state_sizes=[4], projected_state_sizes=[8])
    with pytest.raises(ValueError, match="1 numbers; CompressedMamba2ForCausalLM has 2"):
        compressed_model_class(type(stock))(config)


@every_mixed
def test_each_layer_may_have_a_size_of_its_own(family: str) -> None:
    stock = build(family)
    count = len(find_layers(stock))
    written = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    config_class, sizes = compressed_config_class(type(stock.config)), [3, 8][:count]
    config = config_class(**written, state_sizes=sizes, projected_state_sizes=[N] * count)
    model = compressed_model_class(type(stock))(config).eval()
    assert [layer.state_size for layer in find_layers(model)] == sizes
    assert logits_of(model, {"input_ids": tokens()}).isfinite().all()
    assert AutoConfig.for_model(config.model_type).__class__ is config_class


def test_mixed_layers_run_through_the_fast_scan() -> None:
    from hf_compressm import fast_cpu_scan
    from hf_compressm.models.compressed import mixed_multi_head

    stock = mixed_multi_head.mamba2_chunk_scan
    with fast_cpu_scan():
        assert mixed_multi_head.mamba2_chunk_scan is not stock
    assert mixed_multi_head.mamba2_chunk_scan is stock


@every_mixed
def test_a_mixed_folder_does_not_load_into_the_stock_class(family: str, tmp_path) -> None:
    model = cut(family)
    model.save_pretrained(tmp_path)
    stock = type(build(family))
    for stock_class in (stock, type(build(family).base_model)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            stock_class.from_pretrained(tmp_path)
    stock_config = stock.config_class.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[model.config.state_size_name] == HALF
    assert getattr(stock_config, model.config.state_size_name) == HALF
    again = type(model).from_pretrained(tmp_path)
    assert getattr(again.config, model.config.state_size_name) == N
    found, expected = (logits_of(each, {"input_ids": tokens()}) for each in (again, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert type(model.config).from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()


def test_folders_of_earlier_versions_tell_the_projected_size_and_load(tmp_path) -> None:
    model = cut("mamba2")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "state_size": N}))
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, {"input_ids": tokens()}), logits_of(model, {"input_ids": tokens()}))
