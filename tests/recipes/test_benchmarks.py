"""The benchmarks of the CPU, at sizes of no meaning."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import floor  # noqa: E402
import mixed_cost  # noqa: E402
from common import make_mamba, token_batch  # noqa: E402


def test_the_floor_is_measured_beside_all_peers(tmp_path, capsys) -> None:
    pytest.importorskip("mambapy")
    floor.main(["--tiny", "--repeats", "1", "--output-dir", str(tmp_path)])
    (found,) = json.loads((tmp_path / "floor.json").read_text()).values()
    assert list(found) == ["4", "2"]
    assert all(set(times) == {"floor", "hf_compressm", "transformers", "mambapy"} for times in found.values())
    assert "ours / floor" in (tmp_path / "floor.md").read_text() and "1 layers of width 8" in capsys.readouterr().out


def test_what_a_mixed_form_adds_and_saves_is_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mixed_cost, "FAMILIES", {"mamba2": "Mamba2"})
    threads = torch.get_num_threads()
    arguments = ["--widths", "16", "--sizes", "8", "--batch", "2", "6", "--repeats", "1"]
    try:
        mixed_cost.main([*arguments, "--output-dir", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "mixed_cost.json").read_text())
    # Two layers, each with two matrices of 8 x r and 32 channels, four bytes a number.
    assert [row["r"] for row in rows] == [6, 4, 2, 1]
    assert [row["added_bytes"] for row in rows] == [2 * 2 * 8 * row["r"] * 4 for row in rows]
    assert [row["saved_bytes"] for row in rows] == [2 * 32 * (8 - row["r"]) * 4 for row in rows]
    assert (tmp_path / "mixed_cost.md").read_text().count("| no ") == 1


def test_peers_that_need_more_memory_than_there_is_are_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(floor, "fits_in_memory", lambda *_: False)
    floor.main(["--tiny", "--repeats", "1", "--output-dir", str(tmp_path)])
    (found,) = json.loads((tmp_path / "floor.json").read_text()).values()
    assert all(set(times) == {"floor", "hf_compressm"} for times in found.values())
    assert (tmp_path / "floor.md").read_text().count("| - ") == 4


def test_the_floor_computes_every_product_of_the_projections() -> None:
    """Its products are those of the stock model, forward and backward, and it leaves out all else of a mixer."""
    sizes = {"hidden_size": 8, "layers": 2}

    def operations(model: torch.nn.Module) -> dict[str, list]:
        with torch.profiler.profile(record_shapes=True) as profile:
            model.train()(**token_batch(2, 6)).loss.backward()
        products = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
        return {"products": sorted(map(str, products)), "names": {event.name for event in profile.events()}}

    stock, alone = operations(make_mamba(4, **sizes)), operations(floor.floor_model(4, **sizes))
    assert len(alone["products"]) == len(stock["products"]) == 3 * (2 * 4 + 1)
    assert {"aten::silu", "aten::softplus", "aten::convolution"} <= stock["names"]
    assert not {"aten::silu", "aten::softplus", "aten::convolution", "aten::cat"} & alone["names"]
