"""The benchmarks of linear attention, at sizes of no meaning."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import delta_rule_accuracy  # noqa: E402
import recall  # noqa: E402
from delta_rule_models import make_delta_rule_model  # noqa: E402
from selective_tasks import digits_task  # noqa: E402

from hf_compressm.architectures import find_layers  # noqa: E402


@pytest.fixture
def few_pairs(monkeypatch) -> None:
    for name, value in {"PAIRS": (2, 4), "QUERIES": 8, "TEST_ROWS": 8, "CALIBRATION_ROWS": 4}.items():
        monkeypatch.setattr(recall, name, value)


@pytest.mark.parametrize("pairs", [1, 4, 64])
def test_the_answer_to_a_query_is_the_value_behind_its_key(pairs) -> None:
    batch = recall.sequences(pairs, 5, torch.Generator().manual_seed(0))
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        stored = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]))
        queries = tokens[2 * pairs : 3 * pairs]
        assert sorted(queries) == sorted(stored) and len(stored) == pairs
        # A causal model predicts the label of the next token.
        assert labels[2 * pairs + 1 :] == [stored[query] for query in queries]
        assert set(labels[: 2 * pairs + 1]) == {-100}


def test_recall_counts_the_answers_that_are_right(few_pairs) -> None:
    class Lookup(torch.nn.Module):
        """Knows the answer of every query but the last one."""

        def forward(self, input_ids):
            pairs = input_ids.shape[1] // 3
            logits = torch.zeros(*input_ids.shape, recall.KEYS + recall.VALUES + 1)
            for row, tokens in enumerate(input_ids.tolist()):
                stored = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]))
                for place, query in list(enumerate(tokens))[2 * pairs : 3 * pairs - 1]:
                    logits[row, place, stored[query]] = 1
            return type("Output", (), {"logits": logits})

    assert recall.recall(Lookup()) == {"2": 0.5, "4": 0.75}


def test_recall_goes_on_with_the_runs_that_are_missing(few_pairs, tmp_path) -> None:
    arguments = ["--seeds", "1", "--steps", "4", "--sizes", "8", "--output-dir", str(tmp_path)]
    recall.main(arguments)
    path = tmp_path / "recall.json"
    runs = json.loads(path.read_text())
    assert [(run["form"], run["moment"]) for run in runs] == [
        ("full", 0.0), ("from scratch", 0.0), ("mixed", 0.1), ("mixed", 0.3), ("mixed", 0.5), ("mixed", 1.0),
        ("selection", 1.0),
    ]  # fmt: skip
    assert "mixed, cut after 30%" in path.with_suffix(".md").read_text()
    at_the_end = runs[5]
    assert at_the_end["recall"] == at_the_end["right after"]
    path.write_text(json.dumps([{**run, "known": True} for run in runs[:3] + runs[4:]]))
    recall.main(arguments)
    again = json.loads(path.read_text())
    assert [run.pop("known", False) for run in again] == [True] * 3 + [False] + [True] * 3
    assert again == runs, "the same data and weights once more"


@pytest.mark.parametrize("family", ["kimi_delta", "minimax"])
def test_families_that_no_stock_class_holds_have_recall_tables_of_their_own(family, few_pairs, tmp_path) -> None:
    arguments = ["--family", family, "--seeds", "1", "--steps", "2", "--sizes", "8", "--output-dir", str(tmp_path)]
    recall.main(arguments)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"recall_{family}.json", f"recall_{family}.md"]
    runs = json.loads((tmp_path / f"recall_{family}.json").read_text())
    assert {run["form"] for run in runs} == {"full", "from scratch", "mixed"}
    assert recall.NAMES[family] in (tmp_path / f"recall_{family}.md").read_text()


def test_runs_of_another_length_are_not_mixed(few_pairs, tmp_path) -> None:
    (tmp_path / "recall.json").write_text(json.dumps([{"steps": 7}]))
    with pytest.raises(SystemExit, match="another number of steps than 4"):
        recall.main(["--steps", "4", "--output-dir", str(tmp_path)])


def test_every_way_to_cut_linear_attention_is_judged(monkeypatch, tmp_path) -> None:
    judged = []

    def judge(model) -> float:
        judged.append(model)
        return float(len(judged))

    task = dataclasses.replace(digits_task(), judge=judge, batch_size=2)
    settings = {"KEPT": (8,), "IN_TRAINING_SIZES": (4,), "MOMENTS": (0.5,), "CALIBRATION_ROWS": {"digits": 4}}
    for name, value in {**settings, "digits_task": lambda: task}.items():
        monkeypatch.setattr(delta_rule_accuracy, name, value)
    arguments = ["--seeds", "1", "--steps", "2", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["first.py"])
    delta_rule_accuracy.main(arguments)
    models = json.loads((tmp_path / "delta_rule_cut_digits.json").read_text())
    for found in models:
        assert list(found["right after"]) == list(delta_rule_accuracy.METHODS[found["family"]])
    assert not (tmp_path / "delta_rule_training_digits.md").exists()
    monkeypatch.setattr(sys, "argv", ["second.py"])
    delta_rule_accuracy.main([*arguments, "--in-training"])
    again = json.loads((tmp_path / "delta_rule_cut_digits.json").read_text())
    assert [found["right after"] for found in again] == [found["right after"] for found in models]
    # With eight heads the cache of xLSTM takes multiples of eight.
    in_training = {found["family"]: found["in training"] for found in again if found["family"] != "xlstm"}
    assert set(in_training.pop("gated_delta_net")["4"]) == {"from scratch", "cut at 50%"}
    assert all(set(found["4"]) == {"cut at 50%"} for found in in_training.values())
    table = (tmp_path / "delta_rule_training_digits.md").read_text()
    assert "| kimi_delta      | 4   |" in table and "xlstm  " not in table
    assert table.count("first.py") == table.count("second.py") == 1, "each command is told once"


def test_a_new_size_is_cut_to_without_judging_the_known_ones_again(monkeypatch, tmp_path) -> None:
    judged = []

    def judge(model) -> float:
        judged.append(find_layers(model)[0].state_size)
        return 0.5

    task = dataclasses.replace(digits_task(), judge=judge, batch_size=2)
    settings = {"KEPT": (8,), "MOMENTS": (0.5,), "CALIBRATION_ROWS": {"digits": 4}, "digits_task": lambda: task}
    for name, value in settings.items():
        monkeypatch.setattr(delta_rule_accuracy, name, value)
    arguments = ["--steps", "2", "--output-dir", str(tmp_path), "--in-training"]
    for seeds, sizes in ((2, (4,)), (1, (8, 4))):
        monkeypatch.setattr(delta_rule_accuracy, "IN_TRAINING_SIZES", sizes)
        judged.clear()
        delta_rule_accuracy.main([*arguments, "--seeds", str(seeds), "--families", "kimi_delta"])
    assert judged == [64, 8]
    found = json.loads((tmp_path / "delta_rule_cut_digits.json").read_text())
    assert [set(model["in training"]) for model in found] == [{"4", "8"}, {"4"}]
    table = (tmp_path / "delta_rule_training_digits.md").read_text().splitlines()
    assert [[row.split("|")[2].strip(), row.split("|")[-2].strip()] for row in table[4:6]] == [["8", "1"], ["4", "2"]]


def test_channels_are_cut_in_the_stock_class_and_directions_in_a_mixed_one() -> None:
    model = make_delta_rule_model("gated_delta_net", 8)
    chosen = delta_rule_accuracy.selection_truncation(torch.rand(2, 64), 4)
    names = {
        name: type(delta_rule_accuracy.cut(model, [chosen, chosen], name)).__name__
        for name in ("channels", "any, mixed")
    }
    assert names == {"channels": "Qwen3NextForCausalLM", "any, mixed": "CompressedQwen3NextForCausalLM"}


def test_small_models_start_with_decays_that_leave_something_to_remember() -> None:
    torch.manual_seed(0)
    for family in ("gated_delta_net", "kimi_delta"):
        time_steps = [
            torch.nn.functional.softplus(parameter)
            for name, parameter in make_delta_rule_model(family, 8).named_parameters()
            if name.endswith("dt_bias")
        ]
        assert len(time_steps) == 2 and all(step.min() > 0.0009 and step.max() < 0.11 for step in time_steps)
