"""Everything that leaves for the Hub and comes back, with the real client against a server on a loopback port."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load

from hf_compressm.cards import PICTURE_NAME

from .clients import client
from .loopback import EXPIRED_TOKEN, READ_TOKEN

FILES = {
    "README.md",
    "compressm_history.json",
    "compressm_config.json",
    PICTURE_NAME,
    "config.json",
    "model.safetensors",
}

pytestmark = pytest.mark.xdist_group("loopback")


TRAIN = """
import json, sys
import torch
from transformers import Trainer, TrainingArguments
from hf_compressm import CompreSSMCallback, CompreSSMConfig
from tests.cases import tiny_mamba, token_batch
from tests.hub.tokenizer import tiny_tokenizer

rows = [{name: values[i] for name, values in token_batch(16).items()} for i in range(16)]
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    model = tiny_mamba()
    args = TrainingArguments(
        output_dir=f"run-{strategy}", max_steps=8, per_device_train_batch_size=4, save_strategy="steps", save_steps=4,
        eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, push_to_hub=True,
        hub_strategy=strategy, hub_model_id=f"me/run-{strategy}", hub_always_push=True, hub_private_repo=True,
    )
    callback = CompreSSMCallback(CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0.0, 0.75)))
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback],
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.push_to_hub()
model.push_to_hub("me/from-model")
model.save_pretrained("from-save", push_to_hub=True, repo_id="me/from-save")
tokens = token_batch()["input_ids"]
model.eval()
with torch.no_grad():
    logits = model(tokens, use_cache=False).logits
print(json.dumps({"tokens": tokens.tolist(), "logits": logits.flatten().tolist()}))
"""


@pytest.fixture(scope="module")
def trained(hub, work):
    """Runs with every strategy of the Trainer, and a model pushed by itself."""
    return client(hub, work, TRAIN)


def state_size_in(files: dict[str, bytes], folder: str = "") -> set[int]:
    """The state sizes that configuration, weights, history and card tell; one where they agree."""
    config = json.loads(files[f"{folder}config.json"])
    weights = load(files[f"{folder}model.safetensors"])
    history = json.loads(files[f"{folder}compressm_history.json"])["checks"]
    card = files[f"{folder}README.md"].decode()
    told = {int(line.split("|")[3]) for line in card.splitlines() if line.startswith("| `backbone")}
    return (
        {config["state_size"]}
        | {tensor.shape[1] for name, tensor in weights.items() if name.endswith("A_log")}
        | {layer["size_after"] for layer in history[-1]["layers"]}
        | told
    )


REPOSITORIES = ["run-end", "run-every_save", "run-checkpoint", "run-all_checkpoints", "from-model", "from-save"]


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_is_pushed_is_one_model(hub, trained, name: str) -> None:
    files = hub.files(f"me/{name}")
    assert set(files) >= FILES
    assert state_size_in(files) == {4}
    card = files["README.md"].decode()
    assert f'from_pretrained("me/{name}")' in card
    assert ("Training hyperparameters" in card) == name.startswith("run")
    assert files[PICTURE_NAME].startswith(b"\x89PNG")


def test_every_revision_on_the_way_was_one_model(hub, trained) -> None:
    repository = hub.repositories["me/run-every_save"]
    messages = ["initial commit", "Training in progress, step 4", "Training in progress, step 8", "End of training"]
    # The Trainer leaves a push out while the one before it is under way, and a push without changes makes no revision.
    assert repository.messages[0] == messages[0] and len(repository.messages) >= 3
    assert [message for message in messages if message in repository.messages] == repository.messages
    sizes = []
    for sha in repository.commits:
        files = hub.files("me/run-every_save", sha)
        if "config.json" in files:
            if "compressm_history.json" in files:
                sizes.append(state_size_in(files))
            else:
                sizes.append({json.loads(files["config.json"])["state_size"]})
    # The cut came after step 6, between the two saves.
    assert sizes in ([{8}, {4}, {4}], [{8}, {4}], [{4}, {4}])


@pytest.mark.parametrize(
    "name, folder", [("run-checkpoint", "last-checkpoint/"), ("run-all_checkpoints", "checkpoint-8/")]
)
def test_pushed_checkpoints_are_one_model(hub, trained, name: str, folder: str) -> None:
    assert state_size_in(hub.files(f"me/{name}"), folder) == {4}


LOAD = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, pipeline

assert importlib.util.find_spec("hf_compressm") is None, "this environment must not have the library"
tokens = torch.tensor(json.loads(sys.argv[1]))
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[2], output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(tokens, use_cache=False).logits
text = pipeline("text-generation", model=sys.argv[3])("a b c", max_new_tokens=4, do_sample=False)[0]["generated_text"]
exported = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)
print(json.dumps({
    "class": type(model).__module__ + "." + type(model).__name__, "state_size": model.config.state_size,
    "logits": logits.flatten().tolist(), "text": text, "unloaded": [sorted(map(str, info[k])) for k in info],
    "exported": torch.equal(exported.module()(tokens, use_cache=False).logits, logits),
}))
"""


def test_stock_transformers_loads_it_by_name_in_a_fresh_cache(hub, work, trained, stock_python) -> None:
    tokens = json.dumps(trained["tokens"])
    found = client(hub, work, LOAD, tokens, "me/from-model", "me/run-end", python=stock_python)
    assert found["class"] == "transformers.models.mamba.modeling_mamba.MambaForCausalLM"
    assert found["state_size"] == 4 and found["unloaded"] == [[]] * len(found["unloaded"])
    assert found["logits"] == pytest.approx(trained["logits"], abs=1e-5)
    assert found["text"].startswith("a b c") and len(found["text"].replace(" ", "")) == 7
    assert found["exported"]


PUSH = """
import json, sys, time
from pathlib import Path
from hf_compressm import CompreSSMConfig, compress
from hf_compressm.errors import CompreSSMError
from hf_compressm.hub import fetch, load_model, push_folder
from tests.cases import tiny_mamba, token_batch

model = tiny_mamba()
compress(model, [token_batch()], CompreSSMConfig(strategy="target", target_state_size=4))
model.save_pretrained("small")
before = {p.name: p.read_bytes() for p in Path("small").iterdir() if p.name != "README.md"}
Path("small/.env").write_text("SECRET=1")
Path("small/optimizer.pt").write_bytes(b"pickle")

def attempt(call, *args, **kwargs):
    try:
        return str(call(*args, **kwargs))
    except CompreSSMError as error:
        return f"{type(error).__name__}: {error}"

outcome = {}
for name in json.loads(sys.argv[1]):
    outcome[name] = attempt(push_folder, "small", f"me/{name}", attempts=3, wait=0.01)
    if outcome[name].startswith("HubError"):
        outcome[f"{name}, again"] = attempt(push_folder, "small", f"me/{name}", attempts=3, wait=0.01)
outcome["branch"] = attempt(push_folder, "small", "me/fine", revision="v2", private=True)
outcome["no name"] = attempt(push_folder, "small", "me/not a name/at all")
outcome["no model"] = attempt(fetch, "me/nothing-here")
outcome["no revision"] = attempt(fetch, "me/fine", revision="v9")
outcome["loaded"] = load_model(fetch("me/fine", revision="main")).config.state_size

Path("small/link.json").symlink_to("/etc/hostname")
outcome["link"] = attempt(push_folder, "small", "me/never")
Path("small/link.json").unlink()
config = Path("small/config.json")
config.write_text(config.read_text().replace('"state_size": 4', '"state_size": 6'))
outcome["other config"] = attempt(push_folder, "small", "me/never")
config.write_bytes(before["config.json"])
outcome["whole"] = before == {p.name: p.read_bytes() for p in Path("small").iterdir() if p.name in before}
print(json.dumps(outcome))
"""

PASSING = ["busy", "breaks", "commit-breaks", "conflict"]
LASTING = ["forbidden", "too-large", "down"]


@pytest.fixture(scope="module")
def pushed(hub, work):
    """Pushes into one trouble after the other; each repository has its own."""
    hub.fail("POST", r"/api/models/me/busy/preupload", 503)
    hub.fail("POST", r"/me/breaks.git/info/lfs", None)
    hub.fail("POST", r"/api/models/me/commit-breaks/commit", None)
    hub.fail("POST", r"/api/models/me/conflict/commit", 412, message="A commit has happened since")
    hub.fail("POST", r"/api/models/me/forbidden/preupload", 403)
    hub.fail("POST", r"/api/models/me/too-large/commit", 413)
    hub.fail("POST", r"/api/models/me/down/commit", 500, times=3)
    return client(hub, work, PUSH, json.dumps(["fine", *PASSING, *LASTING]))


@pytest.mark.parametrize("name", ["fine", *PASSING])
def test_passing_trouble_is_survived(hub, pushed, name: str) -> None:
    assert pushed[name].startswith(f"{hub.url}/me/{name}/commit/")
    assert set(hub.files(f"me/{name}")) >= FILES and state_size_in(hub.files(f"me/{name}")) == {4}


@pytest.mark.parametrize(
    "name, told",
    [
        ("forbidden", "may not write there"),
        ("too-large", "larger than the Hub allows"),
        ("down", "a problem of its own"),
    ],
)
def test_lasting_trouble_is_told_and_a_later_push_succeeds(hub, pushed, name: str, told: str) -> None:
    assert pushed[name].startswith("HubError: pushing to me/") and told in pushed[name]
    assert pushed[f"{name}, again"].startswith(hub.url) and state_size_in(hub.files(f"me/{name}")) == {4}


def test_local_files_stay_whole(pushed) -> None:
    assert pushed["whole"]


def test_secrets_and_pickles_stay_behind(hub, pushed) -> None:
    assert not {".env", "optimizer.pt"} & set(hub.files("me/fine"))


def test_a_folder_that_is_not_one_model_is_not_pushed(hub, pushed) -> None:
    assert "not one model" in pushed["other config"] and "outside of the folder" in pushed["link"]
    assert "me/never" not in hub.repositories


def test_branches_names_and_revisions(hub, pushed) -> None:
    # The repository is there already and public, although a private one was asked for.
    assert "is public; nothing was pushed" in pushed["branch"]
    assert pushed["no name"].startswith("ConfigurationError")
    assert "does not exist, or is private" in pushed["no model"] and "no such revision" in pushed["no revision"]
    assert pushed["loaded"] == 4


REFUSED = """
import json, os, sys
from hf_compressm.errors import CompreSSMError
from hf_compressm.hub import fetch, push_folder

outcome = {}
for token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None) if token is None else os.environ.update(HF_TOKEN=token)
    for what, call in (("push", push_folder), ("load", fetch)):
        arguments = ("small", "me/refused") if what == "push" else ("me/run-end",)
        try:
            outcome[f"{what} {token}"] = str(call(*arguments))
        except CompreSSMError as error:
            outcome[f"{what} {token}"] = str(error)
print(json.dumps(outcome))
"""


def test_tokens_are_asked_for(hub, work, trained, pushed) -> None:
    said = client(hub, work, REFUSED, json.dumps([None, EXPIRED_TOKEN, READ_TOKEN]))
    assert "a token is needed" in said["push None"]
    assert "is private and the token cannot see it" in said["load None"]
    assert "may have expired" in said[f"push {EXPIRED_TOKEN}"] and "may have expired" in said[f"load {EXPIRED_TOKEN}"]
    assert "may not write there" in said[f"push {READ_TOKEN}"] and "snapshots" in said[f"load {READ_TOKEN}"]
    assert "me/refused" not in hub.repositories


COMMAND = """
import json, sys
from typer.testing import CliRunner
from hf_compressm.cli.app import app

open("book.txt", "w").write(" ".join("abcdefghijklmnopqrstuvwx"[(i * i) % 24] for i in range(2000)))
result = CliRunner().invoke(app, sys.argv[1:])
print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


def test_the_command_line_compresses_by_name_and_pushes(hub, work, trained) -> None:
    data = ("--text-file", "book.txt", "--length", "32", "--sequences", "8", "--quiet")
    options = ("--ratio", "0.5", "--push-to-hub", "me/from-command", "--private")
    code, out, told = client(hub, work, COMMAND, "compress", "me/run-end", "-o", "halved", *options, *data)
    assert code == 0 and f"Pushed: {hub.url}/me/from-command/commit/" in out, told
    files = hub.files("me/from-command")
    assert hub.repositories["me/from-command"].private
    assert set(files) >= {*FILES, "tokenizer.json"} and state_size_in(files) == {2}
    card = files["README.md"].decode()
    assert "base_model: me/run-end" in card and "from 8 to 2 states" in card
    assert 'from_pretrained("me/from-command")' in card


def test_the_client_asked_for_nothing_that_the_server_does_not_know(hub, trained, pushed) -> None:
    known = ("/api/", "/me/", "/lfs/")
    assert [request for request in hub.requests if not request.path.startswith(known)] == []
