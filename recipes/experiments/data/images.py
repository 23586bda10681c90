"""Images read pixel by pixel: sMNIST, sCIFAR, sequential Fashion-MNIST, and the digits that scikit-learn ships."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset

from .image_files import Arrays, decoded, read_files, read_folder
from .sequence_data import SequenceCollator, SequenceData, first_examples


def image_data(
    hub_name: str | None = None,
    data_dir: str | None = None,
    data_files: dict | None = None,
    image_column: str = "image",
    label_column: str = "label",
    colour: bool = False,
    pool: int = 1,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> SequenceData:
    """
    Images as sequences of pixels, row by row, standardised with the training set's mean and deviation.

    Args:
        hub_name (`str`, *optional*): Data set of the Hub, or `"sklearn/digits"` for the digits inside scikit-learn.
        data_dir (`str`, *optional*): Folder with local files, used instead; see [`read_folder`].
        data_files (`dict`, *optional*): Parquet files under `"train"` and `"test"`, used instead.
        image_column (`str`, *optional*, defaults to `"image"`): Name of the pictures' column.
        label_column (`str`, *optional*, defaults to `"label"`): Name of the classes' column.
        colour (`bool`, *optional*, defaults to `False`): Three features a pixel instead of its grey level.
        pool (`int`, *optional*, defaults to 1): Averages squares of this many pixels a side.
        train_examples (`int`, *optional*): Only so many training images.
        test_examples (`int`, *optional*): Only so many test images.
    """
    mode = "RGB" if colour else "L"
    if data_files:
        splits = read_files(data_files, image_column, label_column, mode)
    elif data_dir:
        splits = read_folder(data_dir, image_column, label_column, mode)
    elif hub_name == "sklearn/digits":
        splits = _sklearn_digits()
    elif hub_name:
        loaded = load_dataset(hub_name)
        splits = tuple(decoded(loaded[split], image_column, label_column, mode) for split in ("train", "test"))
    else:
        raise ValueError("no data: give a Hub name, --data-dir or --data-files.")
    splits = [(_with_channels(images, colour), labels) for images, labels in splits]
    return sequences_of_pixels(*splits, pool=pool, train_examples=train_examples, test_examples=test_examples)


def sequences_of_pixels(
    train: Arrays, test: Arrays, pool: int = 1, train_examples: int | None = None, test_examples: int | None = None
) -> SequenceData:
    """
    Image arrays as a classification task on sequences.

    Args:
        train (`Arrays`): Training images and their classes.
        test (`Arrays`): Test images and their classes.
        pool (`int`, *optional*, defaults to 1): Averages squares of this many pixels a side.
        train_examples (`int`, *optional*): Only so many training images.
        test_examples (`int`, *optional*): Only so many test images.
    """
    (train_images, train_labels), (test_images, test_labels) = train, test
    channels = train_images.shape[-1]
    sets = [
        first_examples(_dataset(_pooled(images, pool), labels), count)
        for images, labels, count in (
            (train_images, train_labels, train_examples),
            (test_images, test_labels, test_examples),
        )
    ]
    pixels = _pooled(train_images, pool).reshape(-1, channels)
    mean, deviation = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
    return SequenceData(
        *sets,
        num_labels=int(max(train_labels.max(), test_labels.max())) + 1,
        collator=SequenceCollator(tuple(mean.tolist()), tuple(np.maximum(deviation, 1e-6).tolist())),
        input_size=channels,
    )


def _dataset(images: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"values": List(Value("uint8")), "labels": Value("int64")})
    rows = {"values": images.reshape(len(images), -1), "labels": labels}
    return Dataset.from_dict(rows, features=features).with_format("numpy")


def _pooled(images: np.ndarray, pool: int) -> np.ndarray:
    if pool == 1:
        return images
    count, height, width, channels = images.shape
    if height % pool or width % pool:
        raise ValueError(f"data.pool is {pool}, which does not divide images of {height} x {width} pixels.")
    squares = images.reshape(count, height // pool, pool, width // pool, pool, channels)
    return np.rint(squares.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def _with_channels(images: np.ndarray, colour: bool) -> np.ndarray:
    """One or three channels as wanted; CIFAR-10's binary files hold three whatever is wanted."""
    if images.shape[-1] == (3 if colour else 1):
        return images
    if colour:
        return images.repeat(3, axis=-1)
    # The weights of ITU-R 601-2 that Pillow uses for mode "L".
    return np.rint(images @ np.array([0.299, 0.587, 0.114]))[..., None].astype(np.uint8)


def _sklearn_digits() -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] * 15).astype(np.uint8)[..., None]
    labels = digits.target[order].astype(np.int64)
    start = len(labels) - 360
    return (images[:start], labels[:start]), (images[start:], labels[start:])
