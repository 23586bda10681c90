"""The recipes import each other as scripts do: from the folder `recipes`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="session")
def recipes_folder() -> Path:
    return RECIPES


@pytest.fixture
def tiny():
    """The Fashion-MNIST recipe at its tiny scale, on the digits that scikit-learn ships."""
    from experiments.settings import load_settings

    def build(**overrides):
        settings = {"data.hub_name": "sklearn/digits", "data.pool": 2, "training.max_steps": 6}
        return load_settings("sfashion.yaml", "tiny", {**settings, **overrides})

    return build


@pytest.fixture
def digits(tiny):
    from experiments.data import load_data

    return load_data(tiny().data)
