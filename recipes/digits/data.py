"""The 8x8 digits that scikit-learn ships, as sequences of tokens: 64 grey levels, then the class."""

from __future__ import annotations

import torch
from datasets import Dataset
from sklearn.datasets import load_digits

GREY_LEVELS = 17
CLASSES = 10
VOCABULARY = GREY_LEVELS + CLASSES
PIXELS = 64
TEST_EXAMPLES = 360


def augmented(rows: dict[str, list]) -> dict[str, list[torch.Tensor]]:
    """
    Shift each image by up to one column and half of its grey levels by up to two, as `Dataset.set_transform` takes it.

    The tokens of two grey levels know nothing of each other; without this the model learns the 1,437 images by heart.
    """
    tokens = torch.as_tensor(rows["input_ids"]).clone()
    images = tokens[:, :PIXELS].reshape(-1, 8, 8)
    shifts = torch.randint(-1, 2, (len(images),)).tolist()
    images = torch.stack([image.roll(shift, dims=1) for image, shift in zip(images, shifts)])
    noise = torch.randint(-2, 3, images.shape) * torch.randint(0, 2, images.shape)
    tokens[:, :PIXELS] = (images + noise).clamp(0, GREY_LEVELS - 1).flatten(1)
    return {**rows, "input_ids": list(tokens), "labels": list(torch.as_tensor(rows["labels"]))}


def digit_sequences(seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Training and test set of 1,437 and 360 sequences.

    Args:
        seed (`int`, *optional*, defaults to 0): Shuffles the images before the split.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: Rows with `input_ids` and `labels` of 65 tokens each. Only the
        class token has a label; a causal model predicts it from the 64 grey levels before it.
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(digits.data, dtype=torch.long)[order]
    classes = torch.tensor(digits.target, dtype=torch.long)[order] + GREY_LEVELS
    tokens = torch.cat([pixels, classes[:, None]], dim=1)
    labels = torch.full_like(tokens, -100)
    labels[:, PIXELS] = classes
    examples = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()}).with_format("torch")
    test_start = len(examples) - TEST_EXAMPLES
    return examples.select(range(test_start)), examples.select(range(test_start, len(examples)))
