"""Text as bytes: IMDB reviews, and pairs of papers of the ACL Anthology Network (AAN)."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from .sequence_data import SequenceCollator, SequenceData, first_examples

BYTE_VOCABULARY = 257
"""The padding, then the 256 bytes."""

AAN_COLUMNS = ("label", "first_id", "second_id", "first", "second")


def byte_tokens(text: str, max_length: int) -> np.ndarray:
    """The UTF-8 bytes of a text plus one, at most `max_length` of them; 0 is left for the padding."""
    return np.frombuffer(text.encode("utf-8")[:max_length], np.uint8).astype(np.int16) + 1


def imdb_data(
    hub_name: str | None = None,
    data_dir: str | None = None,
    data_files: dict | None = None,
    max_length: int = 4096,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> SequenceData:
    """
    Film reviews and whether they are favourable (Maas et al., 2011), read byte by byte.

    Args:
        hub_name (`str`, *optional*): Data set of the Hub with the columns `text` and `label`.
        data_dir (`str`, *optional*): The folder `aclImdb` (`train/pos/*.txt` ...) or one with parquet files named
            `*train*` and `*test*`, used instead.
        data_files (`dict`, *optional*): Parquet files under `"train"` and `"test"`, used instead.
        max_length (`int`, *optional*, defaults to 4096): Longer texts lose their end.
        train_examples (`int`, *optional*): Only so many training texts.
        test_examples (`int`, *optional*): Only so many test texts.
    """
    if data_files:
        splits = load_dataset("parquet", data_files=data_files)
    elif data_dir:
        splits = _read_reviews(Path(data_dir))
    elif hub_name:
        splits = load_dataset(hub_name)
    else:
        raise ValueError("no data: give a Hub name, --data-dir or --data-files.")

    def encode(row: dict) -> dict:
        return {"tokens": byte_tokens(row["text"], max_length), "labels": row["label"]}

    sets = [
        first_examples(splits[split], count).map(encode, remove_columns=splits[split].column_names)
        for split, count in (("train", train_examples), ("test", test_examples))
    ]
    return SequenceData(
        *(part.with_format("numpy") for part in sets),
        num_labels=2,
        collator=SequenceCollator(),
        vocab_size=BYTE_VOCABULARY,
    )


def _read_reviews(folder: Path) -> DatasetDict:
    files = {split: sorted(map(str, folder.rglob(f"*{split}*.parquet"))) for split in ("train", "test")}
    if all(files.values()):
        return load_dataset("parquet", data_files=files)
    splits = {}
    for split in ("train", "test"):
        rows: dict[str, list] = {"text": [], "label": []}
        for label, name in enumerate(("neg", "pos")):
            for path in sorted((folder / split / name).glob("*.txt")):
                rows["text"].append(path.read_text(encoding="utf-8"))
                rows["label"].append(label)
        if not rows["text"]:
            raise ValueError(
                f"{folder} has neither *{split}*.parquet nor {split}/neg/*.txt and {split}/pos/*.txt (the folder "
                "aclImdb of ai.stanford.edu/~amaas/data/sentiment)."
            )
        splits[split] = Dataset.from_dict(rows)
    return DatasetDict(splits)


def retrieval_data(
    data_dir: str | None = None,
    data_files: dict | None = None,
    max_length: int = 4000,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> SequenceData:
    """
    Pairs of papers and whether one cites the other (Radev et al., 2013, as in the Long Range Arena), byte by byte.

    Args:
        data_dir (`str`, *optional*): Folder with `new_aan_pairs.train.tsv` and `new_aan_pairs.test.tsv`.
        data_files (`dict`, *optional*): Such files under `"train"` and `"test"`, used instead.
        max_length (`int`, *optional*, defaults to 4000): Longer texts lose their end.
        train_examples (`int`, *optional*): Only so many training pairs.
        test_examples (`int`, *optional*): Only so many test pairs.
    """
    if not data_files:
        if not data_dir:
            raise ValueError(
                "AAN has no copy on the Hub that is loaded by name: give --data-dir, the folder tsv_data of the Long "
                "Range Arena's files (github.com/google-research/long-range-arena)."
            )
        data_files = {split: str(Path(data_dir) / f"new_aan_pairs.{split}.tsv") for split in ("train", "test")}
    limits = {"train": train_examples, "test": test_examples}
    sets = [_read_pairs(Path(data_files[split]), max_length, limits[split]) for split in ("train", "test")]
    return SequenceData(*sets, num_labels=2, collator=SequenceCollator(), vocab_size=BYTE_VOCABULARY, paired=True)


def _read_pairs(path: Path, max_length: int, limit: int | None) -> Dataset:
    # The published files have no header and quote nothing: a tab always ends a column, and 3 is csv.QUOTE_NONE.
    rows = load_dataset(
        "csv", data_files=str(path), split="train", delimiter="\t", column_names=list(AAN_COLUMNS), quoting=3
    )

    def encode(row: dict) -> dict:
        return {
            "tokens": byte_tokens(_plain(row["first"]), max_length),
            "second_tokens": byte_tokens(_plain(row["second"]), max_length),
            "labels": int(float(row["label"])),
        }

    return first_examples(rows, limit).map(encode, remove_columns=rows.column_names).with_format("numpy")


def _plain(text: str | None) -> str:
    """The text itself; the published files hold Python's notation of bytes, `b'...'`."""
    text = text or ""
    if text[:2] in ("b'", 'b"'):
        return ast.literal_eval(text).decode("utf-8", errors="replace")
    return text
