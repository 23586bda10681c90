"""Calibration data for the command line: text, a data set of the Hub, or local files, as batches for one model."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CalibrationError, ConfigurationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Formats that hold data and nothing that could run; `datasets` would unpickle a .pkl file.
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
_INPUTS = ("input_ids", "input_values", "pixel_values", "inputs_embeds")
_TEXTS = ("text", "content", "sentence", "document", "review")
_LABELS = ("labels", "label")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_VOCABULARIES = ("tokenizer*.json", "vocab.*", "*.model")


@dataclass(frozen=True)
class DataSource:
    """
    Where calibration data comes from, and how much of it; in a command, an option a field.

    Args:
        text_files (`list[Path]`, *optional*): Text files.
        dataset (`str`, *optional*): A data set of the Hub, as `name` or `name:config`.
        data_files (`list[Path]`, *optional*): Local files of rows.
        split (`str`): Split of the data set.
        text_column (`str`, *optional*): Column that holds text.
        tokenizer (`str`, *optional*): Folder or Hub name of the tokenizer.
        sequences (`int`): Sequences to calibrate on; as many follow for the evaluation.
        length (`int`): Tokens of a sequence of text.
        batch_size (`int`): Sequences of a batch.
    """

    text_files: Annotated[
        list[Path] | None, typer.Option("--text-file", help="Text to calibrate on; may be given several times.")
    ] = None
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Data set of the Hub, as `name` or `name:config`.")
    ] = None
    data_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--data-file", help="Local data (.parquet, .json, .jsonl, .csv, .txt); may be given several times."
        ),
    ] = None
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train"
    text_column: Annotated[str | None, typer.Option(help="Column that holds text; found by itself as a rule.")] = None
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, where the model's folder has none.")] = None
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 64
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence of text.")] = 512
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 8

    def __post_init__(self) -> None:
        given = [bool(self.text_files), bool(self.dataset), bool(self.data_files)]
        if sum(given) > 1:
            raise ConfigurationError("give one of --text-file, --dataset and --data-file, not several.")
        # Said before a model is loaded, which can take minutes.
        formats = {_FORMATS.get(path.suffix.lower()) for path in self.data_files or ()}
        if None in formats or len(formats) > 1:
            raise CalibrationError(
                f"{self.describe()}: give files of one format, with one of the endings {', '.join(_FORMATS)}."
            )
        for path in [*(self.text_files or ()), *(self.data_files or ())]:
            if not path.is_file():
                raise CalibrationError(f"there is no file {path}.")

    @property
    def is_given(self) -> bool:
        """Whether there is any data."""
        return bool(self.text_files or self.dataset or self.data_files)

    @property
    def dataset_name(self) -> str | None:
        """The data set's name on the Hub."""
        return self.dataset.split(":")[0] if self.dataset else None

    def describe(self) -> str:
        """The data in words, for a card."""
        if self.dataset:
            return f"{self.dataset} ({self.split})"
        return ", ".join(path.name for path in [*(self.text_files or ()), *(self.data_files or ())])


@dataclass(frozen=True)
class Batches:
    """
    Data for one model.

    Args:
        calibration (`list[dict[str, torch.Tensor]]`): What the spectra are measured on.
        evaluation (`list[dict[str, torch.Tensor]]`): Sequences after those, for the evaluation; empty where the data
            ended.
    """

    calibration: list[dict[str, torch.Tensor]] = field(default_factory=list)
    evaluation: list[dict[str, torch.Tensor]] = field(default_factory=list)


@contextmanager
def told_how_to_give_data(source: DataSource) -> Iterator[None]:
    """Where no data was given, say with which option it is when a layer turns out to need some."""
    try:
        yield
    except CalibrationError as error:
        if source.is_given:
            raise
        raise CalibrationError(f"{error} Name some with --text-file, --dataset or --data-file.") from error


def read_batches(model: PreTrainedModel, folder: Path, source: DataSource) -> Batches:
    """
    Read sequences for a model and put them into batches.

    Rows that hold the model's own inputs (`input_ids`, `input_values`, ...) are used as they are. Text goes through the
    tokenizer: cut into pieces of one length for a language model, row by row for a classifier.

    Args:
        model (`transformers.PreTrainedModel`): Its signature says which inputs it takes.
        folder (`Path`): The model's folder, where its tokenizer lies.
        source ([`DataSource`]): Where the data comes from.

    Raises:
        [`~errors.CalibrationError`]: the data cannot be read, is empty, or is nothing that the model takes.
    """
    if not source.is_given:
        return Batches()
    rows = list(itertools.islice(_examples(model, folder, source), 2 * source.sequences))
    if not rows:
        raise CalibrationError(f"{source.describe()} holds no sequence; give more data, or a smaller --length.")
    used, rest = rows[: source.sequences], rows[source.sequences :]
    return Batches(_batched(used, source.batch_size), _batched(rest, source.batch_size))


def _examples(model: PreTrainedModel, folder: Path, source: DataSource) -> Iterator[dict[str, Any]]:
    if source.text_files:
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in source.text_files)
        yield from _pieces(texts, load_tokenizer(folder, source), source.length)
        return
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    accepted = inspect.signature(model.forward).parameters
    if any(name in first and name in accepted for name in _INPUTS):
        for row in rows:
            yield _with_labels({name: value for name, value in row.items() if name in accepted}, model)
        return
    column = source.text_column or next((name for name in _TEXTS if name in first), None)
    if column not in first:
        raise CalibrationError(
            f"{source.describe()} has the columns {', '.join(first)}; {type(model).__name__} takes "
            f"{', '.join(name for name in _INPUTS if name in accepted)}. Name a column of text with --text-column."
        )
    tokenizer = load_tokenizer(folder, source)
    label = next((name for name in _LABELS if name in first), None)
    if _is_classifier(model) and label is not None:
        for row in rows:
            tokens = tokenizer(row[column], truncation=True, max_length=source.length)["input_ids"]
            yield {"input_ids": tokens, "labels": row[label]}
    else:
        yield from _pieces((row[column] for row in rows), tokenizer, source.length)


def _rows(source: DataSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    if source.dataset:
        name, _, config = source.dataset.partition(":")
        try:
            # A stream: only the rows that are used are downloaded.
            return iter(load_dataset(name, config or None, split=source.split, streaming=True))
        except (OSError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"the data set {source.dataset} (split {source.split!r}) cannot be read: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
    files = source.data_files or []
    kind = _FORMATS[files[0].suffix.lower()]
    return iter(load_dataset(kind, data_files=[str(path) for path in files], split="train", streaming=True))


def require_tokenizer(folder: Path, source: DataSource) -> None:
    """
    Check that text can be read before the model is loaded.

    Args:
        folder (`Path`): The model's folder.
        source ([`DataSource`]): Where the data comes from.

    Raises:
        [`~errors.CalibrationError`]: the data is text, and there is no tokenizer to read it with.
    """
    if source.text_files:
        load_tokenizer(folder, source)


def load_tokenizer(folder: Path, source: DataSource) -> Any:
    """
    The tokenizer that `--tokenizer` names, or that of the model's folder.

    Args:
        folder (`Path`): The model's folder.
        source ([`DataSource`]): Where the data comes from.

    Raises:
        [`~errors.CalibrationError`]: there is none that transformers can read.
        [`~errors.HubError`]: it is on the Hub, which refused or could not be reached.
    """
    from transformers import AutoTokenizer

    from ..hub import fetch

    place = folder if source.tokenizer is None else fetch(source.tokenizer, patterns=_TOKENIZER_FILES)
    # Of a folder without these files transformers makes a tokenizer that knows no word.
    if any(next(place.glob(pattern), None) for pattern in _VOCABULARIES):
        try:
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError):
            pass
    raise CalibrationError(
        f"{source.tokenizer or folder} has no tokenizer that transformers can read. Give the one that the model was "
        "trained with: --tokenizer FOLDER_OR_NAME; or give data with input_ids."
    )


def _pieces(texts: Iterator[str], tokenizer: Any, length: int) -> Iterator[dict[str, Any]]:
    """Consecutive pieces of the running text; what is too short for a piece at the very end is left out."""
    tokens: list[int] = []
    seen_any = False
    for text in texts:
        tokens += tokenizer(text, verbose=False)["input_ids"]
        while len(tokens) >= length:
            piece, tokens = tokens[:length], tokens[length:]
            seen_any = True
            yield {"input_ids": piece, "labels": piece}
    if not seen_any and len(tokens) > 1:
        yield {"input_ids": tokens, "labels": tokens}


def _with_labels(row: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    if "labels" not in row and "input_ids" in row and not _is_classifier(model):
        return {**row, "labels": row["input_ids"]}
    return row


def _is_classifier(model: PreTrainedModel) -> bool:
    return "Classification" in type(model).__name__


def _batched(rows: list[dict[str, Any]], size: int) -> list[dict[str, torch.Tensor]]:
    return [_collated(rows[start : start + size]) for start in range(0, len(rows), size)]


def _collated(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors of one batch; sequences of several lengths are padded at their end, where no state has to pass them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    batch = {}
    for name, values in columns.items():
        ragged = values[0].ndim > 0 and len({len(value) for value in values}) > 1
        filling = -100 if name == "labels" else 0
        batch[name] = pad_sequence(values, batch_first=True, padding_value=filling) if ragged else torch.stack(values)
        if batch[name].dtype == torch.float64:
            batch[name] = batch[name].float()
        if ragged and name in _INPUTS:
            lengths = torch.tensor([len(value) for value in values])
            batch["attention_mask"] = (torch.arange(batch[name].shape[1])[None] < lengths[:, None]).long()
    return batch
