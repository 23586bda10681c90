"""Models that transformers does not have: compressed, pushed, and loaded from the repository alone."""

from __future__ import annotations

import json
import resource

import pytest

from hf_compressm.errors import CompreSSMError
from hf_compressm.hub import load_model
from hf_compressm.models import LRUConfig, LRUForSequenceClassification, S4DConfig, S4DForSequenceClassification

from .clients import client

pytestmark = pytest.mark.xdist_group("loopback-own-models")

PUSH = """
import json
import torch
from transformers import Trainer, TrainingArguments
from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.hub import load_model, push_folder
from hf_compressm.models import (
    LRUConfig, LRUForSequenceClassification, MambaClassifierConfig, MambaForSequenceClassification, S4DConfig,
    S4DForSequenceClassification,
)
from tests.hub.tokenizer import tiny_tokenizer

torch.manual_seed(0)
sizes = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_labels": 3}
models = {
    "lru": LRUForSequenceClassification(LRUConfig(**sizes, state_size=16)),
    "s4d": S4DForSequenceClassification(S4DConfig(**sizes, state_size=16)),
    "mamba-classifier": MambaForSequenceClassification(MambaClassifierConfig(**sizes, state_size=8)),
}
tokens = torch.randint(0, 24, (4, 12))
batch = {"input_ids": tokens, "labels": torch.tensor([0, 1, 2, 0])}
told = {}
for name, model in models.items():
    selective = name == "mamba-classifier"
    config = CompreSSMConfig(tolerance=0.2, uniform=selective)
    record = compress(model, [batch] if selective else None, config)
    model.eval().save_pretrained(name)
    tiny_tokenizer().save_pretrained(name)
    push_folder(name, f"me/{name}")
    again = load_model(name)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        assert torch.equal(again(input_ids=tokens).logits, logits), name
    told[name] = {
        "before": [layer.size_before for layer in record.layers],
        "after": [layer.size_after for layer in record.layers],
        "tokens": tokens.tolist(), "logits": logits.flatten().tolist(),
    }

rows = [{name: values[i % 4] for name, values in batch.items()} for i in range(16)]
args = TrainingArguments(
    output_dir="run", max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2, report_to="none",
    use_cpu=True, disable_tqdm=True, push_to_hub=True, hub_strategy="every_save", hub_always_push=True,
    hub_model_id="me/run",
)
callback = CompreSSMCallback(CompreSSMConfig(tolerance=0.2, uniform=False, window=(0.0, 0.5)))
Trainer(
    model=LRUForSequenceClassification(LRUConfig(**sizes, state_size=16)), args=args, train_dataset=rows,
    callbacks=[callback],
).train()
print(json.dumps(told))
"""

LOAD = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForSequenceClassification, pipeline

assert importlib.util.find_spec("hf_compressm") is None, "this environment must not have the library"
found = {}
for name, told in json.loads(sys.argv[1]).items():
    try:
        AutoModelForSequenceClassification.from_pretrained(f"me/{name}", trust_remote_code=False)
        refused = False
    except ValueError as error:
        refused = "trust_remote_code" in str(error)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        f"me/{name}", trust_remote_code=True, output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(told["tokens"])).logits
    label = pipeline("text-classification", model=f"me/{name}", trust_remote_code=True)("a b c")[0]["label"]
    found[name] = {
        "refused": refused, "logits": logits.flatten().tolist(), "label": label,
        "unloaded": [sorted(map(str, info[k])) for k in info],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(hub, work):
    """Three models, compressed and pushed."""
    return client(hub, work, PUSH)


def test_layers_get_sizes_of_their_own(hub, told) -> None:
    for name in ("lru", "s4d"):
        assert all(after < before for before, after in zip(told[name]["before"], told[name]["after"]))
        files = hub.files(f"me/{name}")
        assert json.loads(files["config.json"])["state_size"] in (told[name]["after"], told[name]["after"][0])
        card = files["README.md"].decode()
        assert "error bound" in card and "computed from the weights alone" in card
        assert f'from_pretrained("me/{name}", trust_remote_code=True)' in card


def test_pushes_of_a_running_training_bring_the_code_along(hub, told) -> None:
    repository = hub.repositories["me/run"]
    pushed = [hub.files("me/run", sha) for sha in repository.commits if "config.json" in hub.files("me/run", sha)]
    assert pushed
    for files in pushed:
        assert {"configuration_lru.py", "modeling_lru.py", "README.md"} <= set(files)
        assert "trust_remote_code=True" in files["README.md"].decode()


@pytest.mark.parametrize("size", [10**9, [10**9, 16], -1, 2**70])
@pytest.mark.parametrize("name", ["lru", "s4d"])
def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path, name: str, size) -> None:
    config, model_class = {
        "lru": (LRUConfig, LRUForSequenceClassification),
        "s4d": (S4DConfig, S4DForSequenceClassification),
    }[name]
    model_class(config(vocab_size=24, hidden_size=8, state_size=16, num_hidden_layers=2)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "state_size": size}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CompreSSMError):
        load_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_the_repository_alone_is_enough_to_load_them(hub, work, told, stock_python) -> None:
    found = client(hub, work, LOAD, json.dumps(told), python=stock_python)
    for name, model in found.items():
        assert model["refused"], f"{name} must not run its code unasked"
        assert model["logits"] == pytest.approx(told[name]["logits"], abs=1e-5)
        assert model["unloaded"] == [[]] * len(model["unloaded"]) and model["label"].startswith("LABEL_")
