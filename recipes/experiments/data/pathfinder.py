"""Pathfinder of the Long Range Arena: are the two dots of a picture joined by a path of dashes?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset, Image

from .image_files import Arrays, decoded, read_files, read_folder
from .images import sequences_of_pixels
from .sequence_data import SequenceData

DIFFICULTIES = ("curv_baseline", "curv_contour_length_9", "curv_contour_length_14")
TEST_SHARE = 0.1


def pathfinder_data(
    data_dir: str | None = None,
    data_files: dict | None = None,
    difficulty: str = "curv_contour_length_14",
    pool: int = 1,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> SequenceData:
    """
    Pathfinder as sequences of grey levels.

    The files come with the Long Range Arena (Tay et al., 2021): `pathfinder32/DIFFICULTY/imgs` and `.../metadata`. They
    have no split; a tenth of the pictures, chosen by a fixed seed, is the test set, and the tenth that others hold out
    for validation is left out, so that the training set is as large as theirs.

    Args:
        data_dir (`str`, *optional*): The folder `pathfinder32`, one of its difficulties, or `train/CLASS/*.png` with
            `test/CLASS/*.png`.
        data_files (`dict`, *optional*): Parquet files under `"train"` and `"test"`, used instead.
        difficulty (`str`, *optional*, defaults to `"curv_contour_length_14"`): One of [`DIFFICULTIES`].
        pool (`int`, *optional*, defaults to 1): Averages squares of this many pixels a side.
        train_examples (`int`, *optional*): Only so many training pictures.
        test_examples (`int`, *optional*): Only so many test pictures.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"data.difficulty is {difficulty!r}; choose one of {', '.join(DIFFICULTIES)}.")
    if data_files:
        splits = read_files(data_files, "image", "label", "L")
    elif not data_dir:
        raise ValueError(
            "Pathfinder has no copy on the Hub that is loaded by name: give --data-dir, the folder pathfinder32 of "
            "the Long Range Arena's files (github.com/google-research/long-range-arena)."
        )
    else:
        folder = Path(data_dir)
        folder = folder / difficulty if (folder / difficulty).is_dir() else folder
        if (folder / "metadata").is_dir():
            # Ten times as many as are wanted leave a test set of their number, without decoding all 200,000.
            splits = _split(_read_metadata(folder, None if not train_examples else 10 * train_examples))
        else:
            splits = read_folder(folder, "image", "label", "L")
    return sequences_of_pixels(*splits, pool=pool, train_examples=train_examples, test_examples=test_examples)


def _read_metadata(folder: Path, limit: int | None) -> Arrays:
    """Every picture that the metadata name; lines of `folder file number label ...`, in files that are text."""
    paths, labels = [], []
    for file in sorted((folder / "metadata").iterdir(), key=lambda path: (len(path.stem), path.stem)):
        for line in file.read_text(encoding="utf-8").splitlines():
            parts = line.split()
            if len(parts) < 4:
                continue
            picture = folder / parts[0] / parts[1]
            # The published files hold an empty one, curv_baseline/imgs/0/sample_172.png.
            if picture.stat().st_size:
                paths.append(str(picture))
                labels.append(int(parts[3]))
        if limit and len(paths) >= limit:
            break
    if not paths:
        raise ValueError(f"{folder / 'metadata'} names no pictures.")
    pictures = Dataset.from_dict({"image": paths, "label": labels}).cast_column("image", Image())
    return decoded(pictures, "image", "label", "L")


def _split(arrays: Arrays) -> tuple[Arrays, Arrays]:
    images, labels = arrays
    order = np.random.default_rng(42).permutation(len(labels))
    held_out = max(1, round(TEST_SHARE * len(labels)))
    test, train = order[:held_out], order[2 * held_out :]
    return (images[train], labels[train]), (images[test], labels[test])
