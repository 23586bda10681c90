"""The commands: what they print, write and refuse."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from transformers import MambaForCausalLM
from typer.testing import CliRunner

import hf_compressm
from hf_compressm import read_history
from hf_compressm.cli.app import app
from tests.cases import VOCABULARY, logits_of, tiny_mamba, token_batch
from tests.hub.tokenizer import tiny_tokenizer
from tests.selective_models import tiny_mamba2

ROOT = Path(hf_compressm.__file__).parents[1]


@pytest.fixture(autouse=True)
def _quiet_and_put_back(monkeypatch):
    """The commands silence other libraries for the whole process; other tests need those as they were."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level, of_the_hub = logging.getLogger("transformers").level, huggingface_hub.utils.logging.get_verbosity()
    yield
    huggingface_hub.utils.logging.set_verbosity(of_the_hub)
    logging.getLogger("transformers").setLevel(level)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with a tokenizer, a text, and rows of tokens."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_mamba(8).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    letters = torch.randint(0, VOCABULARY, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(chr(ord("a") + letter) for letter in letters))
    rows = token_batch(batch=24)["input_ids"].tolist()
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(folder / "rows.parquet")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Run a command in an empty directory beside the model."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "text.txt", "rows.parquet"):
        (tmp_path / name).symlink_to(folder / name)

    def run(*arguments: str):
        return CliRunner().invoke(app, arguments)

    return run


TEXT = ("--text-file", "text.txt", "--length", "32", "--sequences", "16")
ROWS = ("--data-file", "rows.parquet", "--sequences", "12")


def test_analyze_prints_a_table_and_draws_a_picture_where_it_is_asked_to(run) -> None:
    before = set(os.listdir())
    result = run("analyze", "model", *TEXT, "--plot", "spectrum.png")
    assert set(os.listdir()) - before == {"spectrum.png"}
    assert result.exit_code == 0, result.output
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("backbone.layers.0.mixer"))
    ranks = [int(cell) for cell in row[2:7]]
    assert row[1] == "8" and ranks[:4] == sorted(ranks[:4]) and ranks[4] == ranks[2]
    # A_log is 32 x 8 and x_proj has 3 + 2 x 8 rows of 32; the recurrent state is 32 x 8 of four bytes.
    assert row[8] == f"{32 * 8 + (3 + 16) * 32:,}" and "1,024" in row
    assert re.search(r"Training step of 8 x 32 on this machine: [\d.]+ ms now", result.stdout)
    assert Image.open("spectrum.png").size[0] > 1000


def test_analyze_gives_json(run) -> None:
    result = run("analyze", "model", *ROWS, "--json", "--tolerance", "0.3", "--no-timing")
    found = json.loads(result.stdout)
    assert [layer["name"] for layer in found["layers"]] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    layer = found["layers"][0]
    assert len(layer["hankel_singular_values"]) == layer["state_size"] == 8
    assert layer["state_bytes_at_tolerance"] == layer["state_bytes"] * layer["kept_at_tolerance"] // 8
    assert found["loss"] > 0 and found["training_step"] is None and not list(Path().glob("*.png"))


def test_compress_saves_a_model_that_stock_transformers_loads(run) -> None:
    result = run("compress", "model", "-o", "small", "--state-size", "4", *TEXT)
    assert result.exit_code == 0, result.output
    assert "state size 8 -> 4" in result.stdout and "perplexity" in result.stdout and "Saved: small" in result.stdout
    assert "keep 4 states" in result.stderr
    model = MambaForCausalLM.from_pretrained("small")
    assert model.config.state_size == 4 and read_history("small")[0].layers[0].size_after == 4
    card = Path("small/README.md").read_text()
    assert 'from_pretrained("small")' in card and "measured on text.txt" in card and "perplexity" in card
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(os.listdir("small"))
    assert not [name for name in os.listdir() if name.startswith(".")]
    # The cut is the library's own: full size gives what the stock model gives.
    same = run("compress", "model", "-o", "same", "--state-size", "8", *TEXT)
    assert same.exit_code == 3 and "nothing was written" in same.stdout and not Path("same").exists()
    again = run("compress", "small", "-o", "smaller", "--ratio", "0.5", *ROWS)
    assert again.exit_code == 0 and len(read_history("smaller")) == 2
    assert "from 8 to 2 states" in Path("smaller/README.md").read_text()


def test_a_dry_run_says_what_would_be_and_writes_nothing(run) -> None:
    before = set(os.listdir())
    result = run("compress", "model", "--tolerance", "0.3", *ROWS, "--dry-run", "--quiet")
    assert re.search(r"[\d,]+ -> [\d,]+ parameters\n2,048 -> [\d,]+ bytes of recurrent state a sequence", result.stdout)
    assert re.search(r"loss on the calibration data [\d.]+ -> [\d.]+", result.stdout)
    assert result.exit_code == 0 and "would become" in result.stdout and "nothing was written" in result.stdout
    assert result.stderr == "" and set(os.listdir()) == before


def test_sizes_are_tried_and_told(run) -> None:
    arguments = ("analyze", "model", *TEXT, "--batch-size", "4", "--sizes", "2,4", "--no-timing")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if re.match(r"\|\s+[824]\s+\|", line)]
    assert [row[0].strip() for row in rows] == ["8", "4", "2"] and rows[0][2].strip() == "+0.00%"
    found = json.loads(run(*arguments, "--json").stdout)["sizes"]
    assert [row["parameters"] for row in found] == sorted((row["parameters"] for row in found), reverse=True)
    refused = run(*arguments[:-3], "--sizes", "eight")
    assert refused.exit_code != 0 and "give whole numbers with commas" in refused.stderr


def test_a_cut_that_only_adds_is_made_on_demand(run) -> None:
    tiny_mamba2().save_pretrained("mamba2")
    asked = ("mamba2", "--tolerance", "0.9", "--multiple-of", "7", *ROWS)
    told = "left as it was: a cut to 7 states would add 1,792 bytes of weights and save 256 bytes of recurrent state"
    for arguments, code in ((("-o", "small"), 3), (("--dry-run",), 0)):
        result = run("compress", *asked, *arguments)
        assert result.exit_code == code and told in result.stdout
        assert "to cut all the same: give --allow-growth" in result.stdout and not Path("small").exists()
    result = run("compress", *asked, "-o", "small", "--allow-growth")
    assert result.exit_code == 0 and read_history("small")[0].layers[0].size_after == 7, result.output


def test_projections_give_up_rows_on_demand(run) -> None:
    tiny_mamba2().save_pretrained("mamba2")
    asked = ("--projection-rows", "0.5", *ROWS)
    looked = run("analyze", "mamba2", "--tolerance", "0.3", "--no-timing", *asked)
    assert looked.exit_code == 0 and "parameters, rows of B and C 8 -> " in looked.stdout, looked.output
    dry = run("compress", "mamba2", "--state-size", "2", "--dry-run", *asked)
    assert dry.exit_code == 0 and "rows of B and C 8 -> 4\n" in dry.stdout
    result = run("compress", "mamba2", "-o", "small", "--state-size", "2", *asked)
    assert result.exit_code == 0, result.output
    [record] = read_history("small")
    assert [(layer.rows_before, layer.rows_after) for layer in record.layers] == [(8, 4), (8, 4)]
    assert record.parameters_after < record.parameters_before
    card = Path("small/README.md").read_text()
    assert "projection rows 0.5" in card and "hardly read were cut out of the weights" in card
    for value in ("many", "1.5", "0"):
        refused = run("compress", "mamba2", "-o", "other", "--state-size", "2", "--projection-rows", value, *ROWS)
        assert refused.exit_code == 2 and "--projection-rows is" in refused.stderr
    folded = run("compress", "model", "-o", "other", "--state-size", "2", *asked)
    assert folded.exit_code != 0 and "cannot give up rows" in folded.stderr


def test_a_cut_follows_the_loss(run) -> None:
    data = (*TEXT, "--batch-size", "4")
    told = run("compress", "model", "-o", "small", "--max-loss-increase", "50%", *data, "--dry-run")
    assert told.exit_code == 0 and "the loss allows" in told.stdout and not Path("small").exists()
    assert "at most 0.5 of it worse" in told.stderr
    result = run("compress", "model", "-o", "small", "--max-loss-increase", "0.5", *data)
    assert result.exit_code == 0, result.output
    record = read_history("small")[0]
    assert (
        record.layers[0].size_after < 8
        and len(record.trials) > 1
        and "max loss increase 0.5" in (Path("small/README.md").read_text())
    )
    refused = run("compress", "model", "-o", "other", "--max-loss-increase", "200%", *data)
    assert refused.exit_code != 0 and "--max-loss-increase is '200%'" in refused.stderr
    both = run("compress", "model", "-o", "other", "--max-loss-increase", "1%", "--ratio", "0.5", *data)
    assert both.exit_code != 0 and "give one of --tolerance" in both.stderr


def test_an_existing_folder_is_replaced_only_on_demand_and_as_a_whole(run, monkeypatch) -> None:
    Path("small").mkdir()
    Path("small/notes.txt").write_text("mine")
    refused = run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS)
    assert (
        refused.exit_code == 1 and "small is there already" in refused.stderr and os.listdir("small") == ["notes.txt"]
    )

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        broken = run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS, "--overwrite")
    assert broken.exit_code == 1 and "the disk is full" in broken.stderr
    assert os.listdir("small") == ["notes.txt"] and not [name for name in os.listdir() if name.startswith(".")]
    done = run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS, "--overwrite")
    assert done.exit_code == 0 and "notes.txt" not in os.listdir("small") and "config.json" in os.listdir("small")


class Page(HTMLParser):
    """Collects what a page asks of the network, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_report_makes_a_page_that_stands_by_itself(run) -> None:
    run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS)
    history = json.loads(Path("small/compressm_history.json").read_text())
    history["checks"][0]["reason"] = "<script>alert('x')</script>"
    later = {**history["checks"][0], "step": 40, "outcome": "kept"}
    history["checks"].append(later)
    Path("small/compressm_history.json").write_text(json.dumps(history))
    log = [{"loss": 3.0 - step / 100, "step": step} for step in range(0, 60, 10)] + [{"eval_loss": 2.5, "step": 50}]
    Path("small/checkpoint-50").mkdir()
    Path("small/checkpoint-50/trainer_state.json").write_text(json.dumps({"log_history": log}))
    result = run("report", "small")
    assert result.exit_code == 0, result.output
    assert "8 -> 4" in result.stdout and "backbone.layers.1.mixer" in result.stdout
    page = Page()
    text = Path("small/compressm_report.html").read_text()
    page.feed(text)
    assert "script" not in page.tags and "&lt;script&gt;" in text
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "://" not in re.sub(r"base64,[^\"]*", "", text)
    assert Image.open("small/compressm_report.png").size[0] > 2000, "three panels"


def test_analyzing_a_compressed_model_sees_what_it_computes(run) -> None:
    run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS)
    result = run("analyze", "small", *ROWS, "--json", "--no-timing")
    assert json.loads(result.stdout)["layers"][0]["state_size"] == 4
    model = MambaForCausalLM.from_pretrained("small")
    assert torch.isfinite(logits_of(model, token_batch())).all()


ERRORS = [
    (["analyze", "nowhere/at/all"], "neither a folder nor a name on the Hub"),
    (["analyze", "me/model"], "the Hub is switched off here"),
    (["analyze", "model"], "--text-file, --dataset or --data-file"),
    (["analyze", "model", "--text-file", "none.txt"], "none.txt"),
    (["analyze", "model", "--data-file", "text.pkl"], "with one of the endings .parquet"),
    (["compress", "model", "-o", "s", *TEXT, "--method", "balanced"], "cannot hold"),
    (["compress", "model", "-o", "s", *TEXT, "--per-layer", "--stock"], "--per-layer"),
    (["analyze", "model", "--dataset", "me/data"], "me/data (split 'train') cannot be read"),
    (["report", "model"], "has no compressm_history.json"),
    (["push", "nowhere", "me/model"], "nowhere is no folder"),
]


WRONG_USAGE = [
    (["analyze", "model", *TEXT, "--tolerance", "2"], "--tolerance is 2.0; give a number strictly between 0 and 1"),
    (["analyze", "model", *TEXT, *ROWS], "give one of --text-file"),
    (["analyze", "model", *TEXT, "--gramians", "magic"], "--gramians is 'magic'; choose one of"),
    (["analyze", "model", *TEXT, "--sizes", "8"], "--sizes has 8; the model has 8 states, so give 1 to 7"),
    (["compress", "model", "-o", "s", *TEXT, "--ratio", "0.5", "--tolerance", "0.1"], "give one of --tolerance"),
    (["compress", "model", "-o", "s", *TEXT, "--ratio", "2"], "--ratio is 2.0; give a number strictly between 0 and 1, "
     "for example 0.5"),
    (["compress", "model", "-o", "s", *TEXT, "--state-size", "4", "--per-layer"], "leave out --per-layer"),
    (["compress", "model", "-o", "s", *TEXT, "--state-size", "100"], "--state-size is 100, and the model has 8 states"),
    (["compress", "model", "-o", "s", *TEXT, "--state-size", "5", "--multiple-of", "4"], "--state-size is 5 and "
     "--multiple-of is 4; give a multiple of 4, for example 8."),
    (["compress", "model", "-o", "s", *TEXT, "--state-size", "4", "--allow-growth"], "leave out --allow-growth"),
    (["compress", "model", "-o", "s", *TEXT, "--method", "magic"], "--method is 'magic'"),
    (["compress", "model", *TEXT], "-o FOLDER, or look first with --dry-run"),
    (["push", "model", "me/model"], "model was never compressed"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, told", WRONG_USAGE, ids=[" ".join(arguments) for arguments, _ in WRONG_USAGE])
def test_wrong_values_exit_with_2_and_speak_of_the_flags(run, arguments: list[str], told: str) -> None:
    result = run(*arguments, "--quiet")
    assert result.exit_code == 2 and result.stdout == "" and not Path("s").exists()
    assert result.stderr.startswith("hf-compressm: error: ") and told in result.stderr
    for setting in ("reductor", "uniform", "target_", "stock=", "strategy"):
        assert setting not in result.stderr


def test_text_without_a_tokenizer_is_told_before_the_model_is_loaded(run, folder, monkeypatch) -> None:
    tiny_mamba(8).save_pretrained("bare")
    with monkeypatch.context() as patch:
        patch.setattr(MambaForCausalLM, "from_pretrained", None)
        refused = run("compress", "bare", "-o", "small", "--state-size", "4", *TEXT)
    assert refused.exit_code == 1 and "bare has no tokenizer" in refused.stderr and "--tokenizer" in refused.stderr
    result = run("compress", "bare", "-o", "small", "--state-size", "4", *TEXT, "--tokenizer", str(folder / "model"))
    assert result.exit_code == 0, result.output
    assert Path("small/tokenizer.json").is_file(), "the tokenizer that was used"


def test_a_missing_file_is_told_before_the_model_is_loaded(run, monkeypatch) -> None:
    monkeypatch.setattr(MambaForCausalLM, "from_pretrained", None)
    for option in ("--text-file", "--data-file"):
        result = run("analyze", "model", option, "none.txt")
        assert result.exit_code == 1 and "there is no file none.txt" in result.stderr


def test_a_mistyped_folder_is_told_as_one(run) -> None:
    result = run("analyze", "modle")
    assert result.exit_code == 1 and "there is no folder modle here (did you mean model?)" in result.stderr


def test_without_a_network_nothing_is_tried_again() -> None:
    from hf_compressm.hub.errors import HTTP_ERRORS, is_passing, reason

    broken = HTTP_ERRORS[0]("[Errno -2] Name or service not known")
    assert is_passing(broken)
    broken.__cause__ = socket.gaierror(-2, "Name or service not known")
    assert not is_passing(broken) and "no network" in reason(broken, "me/model")
    broken.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert not is_passing(broken) and "no network" in reason(broken, "me/model")


@pytest.mark.parametrize("arguments, told", ERRORS, ids=[" ".join(arguments)[:40] for arguments, _ in ERRORS])
def test_an_error_is_one_line_with_a_hint(run, monkeypatch, arguments: list[str], told: str) -> None:
    result = run(*arguments, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("hf-compressm: error: ") and told in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == "" and not Path("s").exists()


def test_debug_shows_the_traceback(run) -> None:
    result = run("report", "model", "--debug")
    assert isinstance(result.exception, hf_compressm.CompreSSMError)


def test_wrong_usage_has_an_exit_code_of_its_own(run) -> None:
    assert run("compress").exit_code == 2
    assert run("analyze", "model", "--no-such-option").exit_code == 2


def damaged(folder: Path, **changes) -> Path:
    shutil.copytree(folder, "damaged")
    config = json.loads(Path("damaged/config.json").read_text())
    Path("damaged/config.json").write_text(json.dumps({**config, **changes}))
    return Path("damaged")


def test_an_absurd_size_is_refused(run, folder) -> None:
    result = run("analyze", str(damaged(folder / "model", state_size=10**9)), *ROWS)
    assert result.exit_code == 1 and "1000000000" in result.stderr and "not one model" in result.stderr


def test_a_folders_own_code_is_not_run_unasked(run, folder) -> None:
    target = damaged(
        folder / "model", model_type="mine", architectures=["Mine"],
        auto_map={"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.Mine"},
    )  # fmt: skip
    (target / "code.py").write_text("open('ran', 'w')")
    result = run("analyze", str(target), *ROWS)
    assert result.exit_code == 1 and "was not run" in result.stderr and "--trust-remote-code" in result.stderr
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": {"text_config": "someone/kernel@main:forward"}},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
    ],
)
def test_a_kernel_of_another_repository_is_not_fetched_unasked(run, folder, entry: dict) -> None:
    result = run("analyze", str(damaged(folder / "model", **entry)), *ROWS)
    assert result.exit_code == 1 and "someone/kernel" in result.stderr and "was not fetched" in result.stderr


def test_an_interrupt_is_told_and_has_its_exit_code(run, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", interrupted)
    result = run("compress", "model", "-o", "small", "--ratio", "0.5", *ROWS)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert not [name for name in os.listdir() if "small" in name]


def test_a_history_that_is_none_is_refused(run, folder) -> None:
    target = damaged(folder / "model")
    for content in ("[]", "{", '{"checks": [{"outcome": "cut", "path": "../x"}]}', '{"checks": 3}'):
        (target / "compressm_history.json").write_text(content)
        result = run("report", str(target))
        assert result.exit_code == 1 and "is not a history of hf_compressm" in result.stderr


def test_odd_names_work(run) -> None:
    odd = "größe [1] & 'x' #2 {{ y }}"
    result = run("compress", "model", "-o", odd, "--ratio", "0.5", *ROWS)
    assert result.exit_code == 0, result.output
    assert run("report", odd).exit_code == 0
    assert (
        run("analyze", odd, *ROWS, "--no-timing", "--plot", f"{odd}.png").exit_code == 0 and Path(f"{odd}.png").exists()
    )
    assert MambaForCausalLM.from_pretrained(odd).config.state_size == 4


@pytest.mark.parametrize("command", [[], ["analyze"], ["compress"], ["report"], ["push"], ["demo"]])
def test_help_has_examples(run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0 and f"hf-compressm {command[0] if command else 'demo'}" in result.stdout


def test_the_program_starts_quickly_and_completes_in_shells() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "hf_compressm", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "analyze" in result.stdout and "torch" not in re.findall(r"\| +(\w+)$", result.stderr, re.MULTILINE)
    command = [sys.executable, "-m", "hf_compressm", "--show-completion", "bash"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "complete" in result.stdout


def test_the_demo_is_found_and_passes_its_options_on(run, monkeypatch) -> None:
    from hf_compressm.cli import demo

    assert demo.recipe().name == "demo.py"
    called = []
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: called.append(command) or _Finished)
    result = run("demo", "--output-dir", "out", "--steps", "60", "--quiet")
    assert result.exit_code == 0 and called == [
        [sys.executable, str(demo.recipe()), "--output-dir", "out", "--steps", "60", "--quiet"]
    ]


class _Finished:
    returncode = 0
