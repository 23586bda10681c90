"""IMDB, AAN and Pathfinder from files in their published forms."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from experiments.data import load_data
from experiments.data.text import byte_tokens

from tests.recipes.published_files import image_folders, paper_pairs, pathfinder_folder, review_folder


def text_of(tokens) -> str:
    return bytes(int(token) - 1 for token in tokens if token).decode("utf-8")


def test_reviews_from_their_folder(tmp_path) -> None:
    data = load_data({"kind": "imdb", "data_dir": str(review_folder(tmp_path))})
    assert [(text_of(row["tokens"]), int(row["labels"])) for row in data.train] == [("dull", 0), ("très bon", 1)]
    batch = data.collator(list(data.train))
    assert batch["attention_mask"].sum(1).tolist() == [4, 9]
    assert (data.vocab_size, data.num_labels, data.paired) == (257, 2, False)


def test_reviews_from_parquet_files_are_cut_to_length(tmp_path) -> None:
    for split in ("train", "test"):
        rows = {"text": ["a" * 50, "b"], "label": [1, 0]}
        Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    data = load_data({"kind": "imdb", "data_dir": str(tmp_path), "max_length": 8})
    assert [len(row["tokens"]) for row in data.train] == [8, 1]
    files = {split: str(tmp_path / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
    assert len(load_data({"kind": "imdb", "data_files": files, "train_examples": 1}).train) == 1


def test_every_byte_has_a_token_and_none_is_the_padding() -> None:
    tokens = byte_tokens("ÿ\x00é", 100)
    assert tokens.min() >= 1
    assert text_of(tokens) == "ÿ\x00é"


def test_pairs_of_papers(tmp_path) -> None:
    data = load_data({"kind": "retrieval", "data_dir": str(paper_pairs(tmp_path))})
    row = data.train[0]
    assert (text_of(row["tokens"]), text_of(row["second_tokens"])) == ('First "paper', "second's")
    assert data.train["labels"][:].tolist() == [1, 0] * 3
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 12)
    assert text_of(batch["input_ids"][1, 1].tolist()) == "some more"
    assert batch["attention_mask"].sum(-1).tolist() == [[12, 8], [10, 9]]
    assert data.paired


def test_pathfinder_from_the_published_files(tmp_path) -> None:
    data = load_data({"kind": "pathfinder", "data_dir": str(pathfinder_folder(tmp_path))})
    assert (len(data.train), len(data.test)) == (31, 4)  # 39 pictures, for one is empty; 4 for the test, 4 left out
    rows = [*data.train, *data.test]
    greys = [int(row["values"][0]) for row in rows]
    assert len(set(greys)) == len(rows), "no picture is in both sets"
    assert all((grey - 100) % 2 == int(row["labels"]) for grey, row in zip(greys, rows))
    assert data.collator([rows[0]])["input_values"].shape == (1, 1024, 1)


def test_pathfinder_from_folders_of_pictures(tmp_path) -> None:
    images = np.arange(4 * 1024, dtype=np.uint32).reshape(4, 32, 32).astype(np.uint8)
    data = load_data({"kind": "pathfinder", "data_dir": str(image_folders(tmp_path, images, np.array([0, 1, 0, 1])))})
    assert (len(data.train), data.num_labels) == (4, 2)


@pytest.mark.parametrize("kind", ["pathfinder", "retrieval", "imdb"])
def test_what_cannot_be_loaded_by_name_says_what_to_give(kind: str) -> None:
    with pytest.raises(ValueError, match="--data-dir"):
        load_data({"kind": kind})


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"train/neg/\*.txt"):
        load_data({"kind": "imdb", "data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="difficulty is 'hard'"):
        load_data({"kind": "pathfinder", "data_dir": str(tmp_path), "difficulty": "hard"})
