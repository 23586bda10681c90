"""mamba-ssm's own layers and language model, cut: their fused and unfused kernels, their steps and their files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CheckRecord, CompreSSMConfig, compress
from hf_compressm.architectures import find_layers
from hf_compressm.errors import UnsupportedModelError

WIDTH, STATES, KEPT, VOCABULARY, LENGTH = 32, 16, 6, 24, 40
# The length fills no chunk, and the heads come in two groups.
SETTINGS = {"Mamba": {}, "Mamba2": {"headdim": 16, "ngroups": 2, "chunk_size": 16}}
FUSED_PATH = {"Mamba": "use_fast_path", "Mamba2": "use_mem_eff_path"}
HALF = CompreSSMConfig(strategy="fixed", keep_ratio=KEPT / STATES)


@pytest.fixture(params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def language_model(kind: str) -> nn.Module:
    """Two layers of mamba-ssm in its own model; time steps and weights large enough that its states do something."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    ssm_cfg = {"layer": kind.replace("Mamba", "Mamba1") if kind == "Mamba" else kind, "d_state": STATES}
    ssm_cfg |= {"dt_min": 0.05, "dt_max": 0.5, **SETTINGS[kind]}
    config = MambaConfig(d_model=WIDTH, n_layer=2, vocab_size=VOCABULARY, ssm_cfg=ssm_cfg)
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5})


def cut(model: nn.Module) -> CheckRecord:
    record = compress(model, [{"input_ids": tokens()}], HALF, loss_function=loss_of)
    assert record.outcome == "cut", record.reason
    return record


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(one).all() and (one - other).abs().max() <= tolerance * other.abs().max()


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss = loss_of(model, {"input_ids": tokens()})
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_its_language_model_is_cut_saved_and_loaded_by_mamba_ssm(kind: str, tmp_path) -> None:
    model = language_model(kind)
    record = cut(model)
    assert [layer.state_size for layer in find_layers(model)] == [KEPT, KEPT]
    assert model.config.ssm_cfg["d_state"] == KEPT
    assert record.loss_after == pytest.approx(float(loss_of(model, {"input_ids": tokens()})), rel=1e-5)
    model.save_pretrained(str(tmp_path))
    loaded = type(model).from_pretrained(str(tmp_path))
    assert [layer.state_size for layer in find_layers(loaded)] == [KEPT, KEPT]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)


def test_mamba_3_is_refused_with_the_reason() -> None:
    from mamba_ssm.modules.mamba3 import Mamba3

    with pytest.raises(UnsupportedModelError, match="Mamba3: its B and C turn in pairs"):
        find_layers(nn.Sequential(Mamba3(WIDTH, d_state=STATES, headdim=16)))
