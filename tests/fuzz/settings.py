"""Odd settings: `CompreSSMConfig` from arguments, from a `dict` and from JSON."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hf_compressm import CompreSSMConfig

from .judge import ODD_VALUES, Case, mutated, shown, with_odd_value

NAMES = [setting.name for setting in dataclasses.fields(CompreSSMConfig)]


def odd_settings(draw: random.Random, most: int = 3) -> dict[str, Any]:
    """
    One to `most` settings with odd values.

    Args:
        draw (`random.Random`): Chooses them.
        most (`int`, *optional*, defaults to 3): The most settings.
    """
    return {name: draw.choice(ODD_VALUES) for name in draw.sample(NAMES, draw.randint(1, most))}


def require_round_trip(config: CompreSSMConfig) -> None:
    """Check that settings come back from their own JSON, which holds no NaN."""
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert CompreSSMConfig.from_dict(json.loads(text)) == config, "the settings do not come back from their JSON"


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """
    Odd settings without end.

    Args:
        draw (`random.Random`): Chooses them.
        folder (`Path`): Where files may be written.
    """
    whole = CompreSSMConfig(tolerance=0.02, interval=5, window=(0, 50)).to_json_string()
    while True:
        kind = draw.choice(["arguments", "arguments", "dict", "unknown name", "JSON", "JSON value", "no dict"])
        if kind == "no dict":
            value = draw.choice(ODD_VALUES)
            make = draw.choice([CompreSSMConfig.from_dict, CompreSSMConfig.from_json_string, CompreSSMConfig.coerced])
            yield Case(f"{make.__name__}, an odd value", shown(value), partial(make, value), check=require_round_trip)
            continue
        if kind == "JSON value":
            tree, fault = with_odd_value(json.loads(whole), draw)
            text = json.dumps(tree)
            yield Case(f"JSON, {fault}", shown(text), partial(_from_folder, folder, text), check=require_round_trip)
            continue
        if kind == "JSON":
            text, fault = mutated(whole, draw)
            make = draw.choice([CompreSSMConfig.from_json_string, lambda text: _from_folder(folder, text)])
            yield Case(f"JSON, {fault}", shown(text), partial(make, text), check=require_round_trip)
            continue
        values = odd_settings(draw)
        if kind == "unknown name":
            values[draw.choice(["tolerence", "", "state-size", "\u4e2d", "0"])] = 1
        make = partial(CompreSSMConfig, **values) if kind == "arguments" else partial(CompreSSMConfig.from_dict, values)
        yield Case(kind, shown(values), make, check=require_round_trip, names=tuple(values))


def _from_folder(folder: Path, text: str) -> CompreSSMConfig:
    saved = CompreSSMConfig().save_pretrained(folder)
    saved.write_text(text, encoding="utf-8", errors="surrogatepass")
    return CompreSSMConfig.from_pretrained(folder)
