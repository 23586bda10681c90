"""Families are found by name, and each name is taken once."""

from __future__ import annotations

import pytest
from torch import nn

from hf_compressm.architectures import find_layers, register
from hf_compressm.architectures.families.mamba import MambaLayer
from hf_compressm.errors import ConfigurationError, UnsupportedModelError


def test_an_unsupported_model_is_told_what_was_found_and_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Supported families: .*mamba.*\. Found: Linear x2, "):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_a_family_name_is_taken_once() -> None:
    assert register(MambaLayer) is MambaLayer
    with pytest.raises(ConfigurationError, match="already registered"):
        register(type("Impostor", (MambaLayer,), {}))


@pytest.mark.parametrize("model", ["state-spaces/mamba-130m-hf", None, nn.Linear, {}])
def test_what_is_no_module_is_refused(model) -> None:
    with pytest.raises(UnsupportedModelError, match="give a torch.nn.Module"):
        find_layers(model)
