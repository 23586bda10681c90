"""Images read pixel by pixel, from every published form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from experiments.data import load_data
from experiments.data.image_files import read_idx

from tests.recipes.published_files import (
    cifar_folder,
    digit_json_folder,
    idx_folder,
    image_folders,
    parquet_images,
    write_idx,
)


@pytest.fixture
def grey():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.array([0, 1, 2, 9, 4, 1])


@pytest.fixture
def coloured():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.array([3, 0, 9, 1])


def by_label(data) -> dict[int, np.ndarray]:
    """One image of each class."""
    return {int(row["labels"]): np.asarray(row["values"]) for row in data.train}


@pytest.mark.parametrize("form", [idx_folder, parquet_images, image_folders])
def test_every_form_of_grey_images_gives_the_same_sequences(form, grey, tmp_path) -> None:
    images, labels = grey
    data = load_data({"kind": "images", "data_dir": str(form(tmp_path, images, labels))})
    assert (len(data.train), len(data.test), data.input_size) == (6, 6, 1)
    found = by_label(data)
    for label in (0, 2, 4) if form is not image_folders else (0,):
        np.testing.assert_array_equal(found[label], images[list(labels).index(label)].ravel())


def test_parquet_files_named_one_by_one(grey, tmp_path) -> None:
    parquet_images(tmp_path, *grey, image_column="img")
    files = {split: str(tmp_path / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
    data = load_data({"kind": "images", "data_files": files, "image_column": "img"})
    np.testing.assert_array_equal(by_label(data)[9], grey[0][3].ravel())
    with pytest.raises(ValueError, match="no column 'picture'; the data has img, label"):
        load_data({"kind": "images", "data_files": files, "image_column": "picture"})


def test_the_npm_package_gets_a_test_set_of_every_digit(tmp_path) -> None:
    data = load_data({"kind": "images", "data_dir": str(digit_json_folder(tmp_path))})
    assert (len(data.train), len(data.test), data.num_labels) == (90, 10, 10)
    assert sorted(data.test["labels"][:].tolist()) == list(range(10))
    assert set(by_label(data)[4].tolist()) == {102}  # 0.4 of 255


@pytest.mark.parametrize("form", ["binary", "parquet"])
def test_cifar_in_colour_and_grey(form, coloured, tmp_path) -> None:
    images, labels = coloured
    folder = (cifar_folder if form == "binary" else parquet_images)(tmp_path, images, labels)
    data = load_data({"kind": "images", "data_dir": str(folder), "colour": True})
    assert data.input_size == 3
    np.testing.assert_array_equal(by_label(data)[9], images[2].ravel())
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["input_values"].shape == (2, 1024, 3)
    grey = load_data({"kind": "images", "data_dir": str(folder)})
    expected = images[2] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(by_label(grey)[9].astype(int) - expected.ravel()).max() <= 1


def test_batches_are_standardised(grey, tmp_path) -> None:
    data = load_data({"kind": "images", "data_dir": str(idx_folder(tmp_path, *grey))})
    batch = data.collator(list(data.train))
    assert batch["input_values"].dtype == torch.float32
    assert abs(float(batch["input_values"].mean())) < 1e-5
    assert float(batch["input_values"].std()) == pytest.approx(1, abs=1e-3)
    assert batch["labels"].tolist() == grey[1].tolist()


def test_pooling_averages_squares(tmp_path) -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    data = load_data({"kind": "images", "data_dir": str(idx_folder(tmp_path, image, np.array([0]))), "pool": 2})
    assert data.train[0]["values"].tolist() == [2, 4, 10, 12]  # 2.5 and 10.5 round to even
    with pytest.raises(ValueError, match="pool is 3, which does not divide images of 4 x 4"):
        load_data({"kind": "images", "data_dir": str(tmp_path), "pool": 3})


def test_fewer_examples_are_drawn_and_not_the_first(grey, tmp_path) -> None:
    folder = str(idx_folder(tmp_path, *grey))
    data = load_data({"kind": "images", "data_dir": folder, "train_examples": 3})
    assert len(data.train) == 3
    assert data.train["labels"][:].tolist() != grey[1][:3].tolist()


def test_the_digits_of_scikit_learn(digits) -> None:
    assert len(digits.train) == 64
    assert digits.collator([digits.train[0]])["input_values"].shape == (1, 16, 1)


def test_damaged_and_unknown_files_are_named(grey, tmp_path) -> None:
    with pytest.raises(ValueError, match="in no known form"):
        load_data({"kind": "images", "data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="no data"):
        load_data({"kind": "images"})
    with pytest.raises(ValueError, match="kind is 'pictures'"):
        load_data({"kind": "pictures"})
    (tmp_path / "x-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x05abc")
    with pytest.raises(ValueError, match=r"announces \(5,\) bytes and holds 3"):
        read_idx(tmp_path / "x-idx1-ubyte")
    (tmp_path / "y").write_bytes(b"PNG.")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "y")
    cifar_folder(tmp_path, np.zeros((1, 32, 32, 3), np.uint8), np.array([0]))
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes, not a multiple of 3073"):
        load_data({"kind": "images", "data_dir": str(tmp_path)})


def test_idx_files_round_trip(tmp_path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "values.gz", values)
    np.testing.assert_array_equal(read_idx(tmp_path / "values.gz"), values)
