"""CompreSSMConfig: validation and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig
from hf_compressm.errors import CompreSSMError, ConfigurationError


@given(
    tolerance=st.floats(1e-9, 1 - 1e-9),
    window=st.tuples(st.floats(0, 0.49), st.floats(0.5, 1)),
    interval=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**31),
    uniform=st.booleans(),
)
def test_json_round_trip(**settings) -> None:
    config = CompreSSMConfig(**settings)
    assert CompreSSMConfig.from_json_string(config.to_json_string()) == config


def test_round_trip_through_a_folder(tmp_path) -> None:
    config = CompreSSMConfig(tolerance=0.03, window=(0.1, 0.4), reductor="selection")
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert CompreSSMConfig.from_pretrained(path.parent) == CompreSSMConfig.from_pretrained(path) == config
    assert json.loads(path.read_text())["window"] == [0.1, 0.4]


@pytest.mark.parametrize(
    "setting, value",
    [
        ("tolerance", 0),
        ("tolerance", 1),
        ("tolerance", -0.1),
        ("tolerance", 1.5),
        ("tolerance", float("nan")),
        ("tolerance", "0.1"),
        ("tolerance", True),
        ("keep_ratio", 0.0),
        ("strategy", "magic"),
        ("reductor", None),
        ("selection_score", "x"),
        ("selection_rule", "first"),
        ("gramians", ""),
        ("window", (0.5, 0.5)),
        ("window", (0.5, 0.1)),
        ("window", (-0.1, 0.1)),
        ("window", (0.0, 1.1)),
        ("window", (0.0,)),
        ("window", 0.1),
        ("window", ("a", "b")),
        ("interval", 0),
        ("interval", 2.5),
        ("minimum_reduction", 1.0),
        ("minimum_reduction", -0.01),
        ("multiple_of", 0),
        ("min_state_size", -3),
        ("calibration_batches", True),
        ("seed", -1),
        ("uniform", 1),
        ("fast_cpu_scan", "yes"),
    ],
)
def test_refuses(setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        CompreSSMConfig(**{setting: value})
    assert setting in str(caught.value) and repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, CompreSSMError)


def test_unknown_settings_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'tolerence'.*tolerance"):
        CompreSSMConfig.from_dict({"tolerence": 0.1})


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "3"])
def test_refuses_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(ConfigurationError):
        CompreSSMConfig.from_json_string(text)


def test_is_immutable() -> None:
    config = CompreSSMConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tolerance = 0.5


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'tolerance' is given more than once"):
        CompreSSMConfig.from_json_string('{"tolerance": 0.1, "seed": 1, "tolerance": 0.2}')
