"""ListOps: the evaluator against values worked out by hand, the grammar's limits, and the published files."""

from __future__ import annotations

import itertools

import pytest
from experiments.data import load_data
from experiments.data.listops import DIGITS, END, OPERATORS, VOCABULARY, Grammar, evaluate_expression

from tests.recipes.published_files import listops_files


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 0 ]", 9),
        ("[MIN 4 7 3 ]", 3),
        ("[MED 5 1 9 ]", 5),
        ("[MED 1 2 ]", 1),  # 1.5 rounded down
        ("[MED 3 8 4 9 ]", 6),
        ("[SM 5 6 7 ]", 8),  # 18 modulo 10
        ("[SM 5 5 ]", 0),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),
        ("[SM [SM 9 9 ] [MAX 1 [MED 7 8 ] ] 3 ]", 8),  # 8 + 7 + 3 = 18
        ("[MIN [MAX 6 2 ] [SM 4 4 4 ] [MED 9 9 1 ] ]", 2),
    ],
)
def test_values_worked_out_by_hand(expression: str, value: int) -> None:
    assert evaluate_expression(expression.split()) == value


@pytest.mark.parametrize("broken", ["", "[MAX 1 2", "1 ]", "1 2", "[MAX ]", "[TOP 1 2 ]", "12"])
def test_broken_expressions_are_refused(broken: str) -> None:
    with pytest.raises(ValueError):
        evaluate_expression(broken.split())


def depth(symbols: list[str]) -> int:
    """Most brackets open at once."""
    balance = list(itertools.accumulate(1 if s in OPERATORS else -(s == END) for s in symbols))
    return max(balance)


def arguments(symbols: list[str]) -> list[int]:
    """How many arguments each operation has."""
    counts, open_counts = [], [0]
    for symbol in symbols:
        if symbol in OPERATORS:
            open_counts[-1] += 1
            open_counts.append(0)
        elif symbol == END:
            counts.append(open_counts.pop())
        else:
            open_counts[-1] += 1
    return counts


@pytest.mark.parametrize("grammar", [Grammar(), Grammar(5, 40, 3, 4)], ids=["long range arena", "small"])
def test_expressions_stay_inside_the_limits(grammar: Grammar) -> None:
    drawn = list(itertools.islice(grammar.expressions(seed=1), 40))
    assert len({tuple(symbols) for symbols in drawn}) == 40
    for symbols in drawn:
        assert grammar.min_length <= len(symbols) <= grammar.max_length
        assert depth(symbols) < grammar.max_depth  # a digit is the last level
        assert all(2 <= count <= grammar.max_arguments for count in arguments(symbols))
        assert 0 <= evaluate_expression(symbols) <= 9
    assert {s for symbols in drawn for s in symbols} == {*OPERATORS, END, *DIGITS}
    assert max(count for symbols in drawn for count in arguments(symbols)) == grammar.max_arguments


def test_labels_are_the_values_and_the_sets_do_not_overlap() -> None:
    settings = {"kind": "listops", "min_length": 4, "max_length": 40, "max_depth": 3}
    data = load_data({**settings, "train_examples": 60, "test_examples": 20})
    names = {number: symbol for symbol, number in VOCABULARY.items()}
    train, test = ({tuple(row["tokens"].tolist()) for row in part} for part in (data.train, data.test))
    assert (len(train), len(test), train & test) == (60, 20, set())
    for row in data.train:
        assert evaluate_expression([names[int(token)] for token in row["tokens"]]) == int(row["labels"])
    again = load_data({**settings, "train_examples": 60, "test_examples": 20})
    assert [row["labels"] for row in again.train] == [row["labels"] for row in data.train]
    other = load_data({**settings, "train_examples": 60, "test_examples": 20, "seed": 1})
    assert {tuple(row["tokens"].tolist()) for row in other.train} != train


def test_batches_are_padded_and_masked() -> None:
    data = load_data({"kind": "listops", "min_length": 4, "max_length": 40, "max_depth": 3, "train_examples": 9})
    batch = data.collator(list(data.train))
    lengths = [len(row["tokens"]) for row in data.train]
    assert batch["input_ids"].shape == (9, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
    assert int(batch["input_ids"].max()) < data.vocab_size == 16


def test_the_published_files(tmp_path) -> None:
    data = load_data({"kind": "listops", "data_dir": str(listops_files(tmp_path))})
    names = {number: symbol for symbol, number in VOCABULARY.items()}
    assert [" ".join(names[int(t)] for t in row["tokens"]) for row in data.train] == ["[MAX 2 9 ]", "[SM 5 6 7 ]"]
    assert data.train["labels"][:].tolist() == [9, 8]


def test_limits_that_are_empty_are_refused() -> None:
    with pytest.raises(ValueError, match="10 to 5 symbols"):
        Grammar(min_length=10, max_length=5)
    with pytest.raises(ValueError, match="at least 2 arguments"):
        Grammar(max_arguments=1)
