"""Cuts of layers that run through mamba-ssm's compiled and Triton kernels; skipped where these or a GPU are missing."""

from __future__ import annotations

import copy
import importlib.util
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import CheckRecord, CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from tests.cases import logits_of
from tests.kernel_paths import homes, torch_path
from tests.training.test_callback import HALF, Notes, Rows, make_trainer


def _installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))
    except ValueError:  # hidden on purpose
        return False


pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _installed()), reason="needs a GPU, mamba-ssm and causal-conv1d"
)

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Widths that the kernels take: a multiple of 8 channels before and behind every split.
SHAPE = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, **NO_TOKENS}


def mamba(state_size: int = 16) -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(state_size=state_size, time_step_min=0.05, time_step_max=0.5, initializer_range=0.2, **SHAPE)
    )


def mamba2(state_size: int = 16) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(
        state_size=state_size, num_heads=8, head_dim=16, n_groups=1, chunk_size=32, time_step_min=0.05,
        time_step_max=0.5, initializer_range=0.2, **SHAPE,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


FORMS = {
    "mamba": (mamba, {}),
    "mamba2-selection": (mamba2, {"stock": True, "reductor": "selection"}),
    "mamba2-mixed": (mamba2, {}),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(autouse=True)
def _first_configuration_that_fits(monkeypatch):
    """A chunk scan has more than a hundred configurations, of which each takes seconds to compile."""
    from triton.runtime import autotuner
    from triton.runtime.errors import OutOfResources

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.configs:
            self.best_config = config  # mamba-ssm reads it
            # mamba-ssm fills the buffers that several programs add to with zeros here.
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            try:
                return self.fn.run(*args, **{**config.all_kwargs(), **kwargs})
            except OutOfResources:
                continue
        raise AssertionError("no configuration fits")

    monkeypatch.setattr(autotuner.Autotuner, "run", run)


def batch(length: int = 96) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 32, (4, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    assert torch.isfinite(one).all() and (one - other).abs().max() <= tolerance * one.abs().max()


def test_transformers_runs_the_kernels() -> None:
    """Otherwise every other test here would pass on its Python loop."""
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    for module in (modeling_mamba, modeling_mamba2):
        found = homes(module)
        assert len(found) == 5 and set(found.values()) == {"mamba_ssm", "causal_conv1d"}, found


def test_a_cut_is_that_on_a_cpu(form) -> None:
    """The kernels' model, calibrated, cut and run, against the torch path on a CPU; training mode and gradients too."""
    build, settings = form
    models, records = [build(), build().cuda()], []
    for model, inputs, path in zip(models, (batch(), on_gpu(batch())), (torch_path, nullcontext)):
        with path():
            records.append(_trained_and_cut(model, inputs, settings))
    here, there = records
    assert here.outcome == there.outcome == "cut"
    assert there.loss_before == pytest.approx(here.loss_before, rel=1e-3)
    assert there.loss_after == pytest.approx(here.loss_after, rel=1e-2)
    for one, other in zip(here.layers, there.layers, strict=True):
        largest = one.hankel_singular_values[0]
        assert other.hankel_singular_values == pytest.approx(one.hankel_singular_values, rel=1e-2, abs=1e-3 * largest)
    # Two cuts may choose other states where two are alike: what is compared from here on is one and the same model.
    twin = copy.deepcopy(models[1]).cpu()
    logits, losses = [], []
    for model, inputs, path in ((twin, batch(), torch_path), (models[1], on_gpu(batch()), nullcontext)):
        with path():
            logits.append(logits_of(model, inputs))
            model.train().zero_grad()
            losses.append(model(**inputs).loss)
            losses[-1].backward()
    close(*logits, 2e-3)
    close(*losses, 1e-3)
    for (name, one), (_, other) in zip(twin.named_parameters(), models[1].named_parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            close(one.grad, other.grad, 2e-2)


def _trained_and_cut(model: nn.Module, inputs: dict[str, torch.Tensor], settings: dict) -> CheckRecord:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    config = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, **settings)
    return compress(model, [inputs], config, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_decodes_step_by_step_what_it_computes_at_once(form, dtype: torch.dtype) -> None:
    build, settings = form
    model = build().cuda()
    compress(model, [on_gpu(batch())], CompreSSMConfig(strategy="fixed", keep_ratio=0.5, **settings))
    model = model.to(dtype).eval()
    tokens = on_gpu(batch(40))["input_ids"]
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        outputs = model(tokens[:, :30], use_cache=True)
        steps = [outputs.logits[:, -1]]
        for position in range(30, 40):
            token = tokens[:, position : position + 1]
            steps.append(model(token, cache_params=outputs.cache_params, use_cache=True).logits[:, -1])
    close(whole[:, 29:], torch.stack(steps, dim=1), 2e-3 if dtype == torch.float32 else 6e-2)
    generated = model.generate(tokens[:, :8], max_new_tokens=8, do_sample=False)
    assert generated.shape == (4, 16)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
def test_a_run_goes_on_after_its_cut(form, precision, tmp_path) -> None:
    build, settings = form
    notes, config = Notes(), CompreSSMConfig.from_dict({**HALF.to_dict(), **settings})
    callback, rows = CompreSSMCallback(config), Rows({name: value.repeat(8, 1) for name, value in batch().items()})
    cuda = {"use_cpu": False, "optim": "adamw_torch_fused", "logging_steps": 1}
    make_trainer(tmp_path, callback, build(), rows, [notes], **cuda, **precision).train()
    assert [record.outcome for record in callback.records] == ["cut"], callback.records[-1].reason
    assert math.isfinite(callback.records[0].loss_after) and all(map(math.isfinite, notes.losses))


@pytest.mark.parametrize("size", [1, 3, 5, 10, 12])
def test_sizes_that_are_no_multiple_of_8_train_on(form, size: int) -> None:
    build, settings = form
    model, inputs = build().cuda(), on_gpu(batch())
    config = CompreSSMConfig(strategy="fixed", keep_ratio=size / 16, **settings)
    if settings and size % 4:
        # The convolution's kernel wants rows of a multiple of 8, which holds for a stock Mamba-2 with these heads.
        with pytest.raises(RuntimeError, match="multiples of 8"):
            compress(model, [inputs], config)
        assert {layer.state_size for layer in find_layers(model)} == {16}
        return
    record = compress(model, [inputs], config)
    assert record.outcome == "cut", record.reason
    model.train()(**inputs).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(logits_of(model, inputs)).all()
    assert model.generate(inputs["input_ids"][:, :8], max_new_tokens=4, do_sample=False).shape == (4, 12)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_mamba_ssms_own_layers_are_cut(kind: str) -> None:
    import mamba_ssm

    torch.manual_seed(0)
    extra = {"headdim": 16, "chunk_size": 32} if kind == "Mamba2" else {}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.layers = nn.ModuleList(getattr(mamba_ssm, kind)(64, d_state=16, **extra) for _ in range(2))
            self.head = nn.Linear(64, 32)

        def forward(self, input_ids, labels):
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = hidden + layer(hidden)
            logits = self.head(hidden)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits

    model, inputs = Model().cuda(), on_gpu(batch())
    whole = model(**inputs)[0]
    record = compress(model, [inputs], CompreSSMConfig(strategy="fixed", keep_ratio=0.5))
    assert record.outcome == "cut", record.reason
    assert [layer.state_size for layer in find_layers(model)] == [8, 8]
    assert record.loss_before == pytest.approx(float(whole), rel=1e-3)
    loss = model(**inputs)[0]
    assert record.loss_after == pytest.approx(float(loss), rel=1e-3), "the fused path and the observed one agree"
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_mamba_ssms_language_model_is_cut_saved_and_loaded_by_mamba_ssm(kind: str, tmp_path) -> None:
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    extra = {"headdim": 16, "chunk_size": 32} if kind == "Mamba2" else {}
    config = Config(d_model=64, n_layer=2, vocab_size=32, ssm_cfg={"layer": kind, "d_state": 16, **extra})
    model, tokens = MambaLMHeadModel(config, device="cuda"), on_gpu(batch())["input_ids"]

    def loss(model, batch):
        logits = model(batch["input_ids"]).logits[:, :-1, :32]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())

    settings = CompreSSMConfig(strategy="fixed", keep_ratio=0.5)
    record = compress(model, [{"input_ids": tokens}], settings, loss_function=loss)
    assert record.outcome == "cut", record.reason
    assert model.config.ssm_cfg["d_state"] == 8
    model.save_pretrained(str(tmp_path))
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path), device="cuda")
    with torch.no_grad():
        close(model(tokens).logits, loaded(tokens).logits, 1e-5)
