"""What the small models of the accuracy benchmarks are trained on and judged by: images by the pixel, and text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedModel

sys.path[:0] = [str(Path(__file__).parents[1] / "digits"), str(Path(__file__).parents[1])]
from data import PIXELS, VOCABULARY, augmented, digit_sequences  # noqa: E402
from experiments.data.images import image_data  # noqa: E402

FASHION_MNIST = "zalando-datasets/fashion_mnist"
CLASSES = 10
TEXT_LENGTH = 128


@dataclass(frozen=True)
class Task:
    """
    What a model is trained on and judged by.

    Args:
        train (`datasets.Dataset`): Rows with `input_ids` and `labels`.
        judge (`Callable`): Takes a model and returns its figure on the test set.
        figure (`str`): What that figure is: test accuracy (higher is better) or perplexity (lower is better).
        vocabulary (`int`): Number of different tokens.
        steps (`int`): Training steps after which the small models have learnt most of it.
        batch_size (`int`): Examples of each step.
    """

    train: Dataset
    judge: Callable[[PreTrainedModel], float]
    figure: str
    vocabulary: int
    steps: int
    batch_size: int


def digits_task() -> Task:
    """The 8x8 digits of scikit-learn read pixel by pixel; the figure is the test accuracy of the class token."""
    train, test = digit_sequences()
    train.set_transform(augmented)
    tokens, classes = test["input_ids"][:][:, :PIXELS], test["labels"][:][:, PIXELS]
    return Task(train, _accuracy(tokens, classes), "test accuracy", VOCABULARY, steps=600, batch_size=32)


def fashion_mnist_task(
    data_dir: str | None = None, grey_levels: int = 16, train_examples: int = 20_000, test_examples: int = 2_000
) -> Task:
    """
    Fashion-MNIST in 14 x 14 squares of 2 x 2 pixels, read one by one; the figure is that of the class token.

    Args:
        data_dir (`str`, *optional*): Folder with its IDX files; the Hub's copy when unset.
        grey_levels (`int`, *optional*, defaults to 16): Different tokens for the grey of a square.
        train_examples (`int`, *optional*, defaults to 20,000): Training images, drawn by a fixed seed.
        test_examples (`int`, *optional*, defaults to 2,000): Test images, drawn by a fixed seed.
    """
    data = image_data(FASHION_MNIST, data_dir, pool=2, train_examples=train_examples, test_examples=test_examples)
    sets = []
    for rows in (data.train, data.test):
        grey = torch.as_tensor(rows["values"][:]).long() * grey_levels // 256
        sets.append((grey, torch.as_tensor(rows["labels"][:]).long() + grey_levels))
    (train, train_classes), (test, test_classes) = sets
    tokens = torch.cat([train, train_classes[:, None]], dim=1)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = train_classes
    rows = Dataset.from_dict({"input_ids": tokens.numpy(), "labels": labels.numpy()}).with_format("torch")
    vocabulary = grey_levels + CLASSES
    return Task(rows, _accuracy(test, test_classes), "test accuracy", vocabulary, steps=400, batch_size=16)


def text_task(files: Sequence[str], test_rows: int = 256) -> Task:
    """
    Bytes of text files in pieces of 128; the figure is the perplexity per byte of the last pieces, kept for the test.

    Args:
        files (`Sequence[str]`): Paths of text files.
        test_rows (`int`, *optional*, defaults to 256): Pieces that the test takes.
    """
    text = "\n".join(load_dataset("text", data_files=list(files), split="train")["text"])
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    pieces = data[: len(data) // TEXT_LENGTH * TEXT_LENGTH].reshape(-1, TEXT_LENGTH)
    train = Dataset.from_dict({"input_ids": pieces[:-test_rows].numpy(), "labels": pieces[:-test_rows].numpy()})
    test = pieces[-test_rows:]

    def perplexity(model: PreTrainedModel) -> float:
        logits = _logits(model, test)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).exp().item()

    return Task(train.with_format("torch"), perplexity, "test perplexity per byte", 256, steps=400, batch_size=32)


def _accuracy(tokens: Tensor, classes: Tensor) -> Callable[[PreTrainedModel], float]:
    """Judges a model by the class token that it predicts after each row of tokens."""

    def judge(model: PreTrainedModel) -> float:
        predicted = torch.cat([logits[:, -1].argmax(-1) for logits in _pieces_of_logits(model, tokens)])
        return (predicted == classes).float().mean().item()

    return judge


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return torch.cat(_pieces_of_logits(model, tokens))


@torch.no_grad()
def _pieces_of_logits(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    model.eval()
    return [model(input_ids=part, use_cache=False).logits for part in tokens.split(120)]
