"""The benchmarks of the CPU, at sizes of no meaning."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import floor  # noqa: E402
import mixed_cost  # noqa: E402
import projection_rows  # noqa: E402
import selective_speed  # noqa: E402
from common import token_batch  # noqa: E402
from floor_models import FAMILIES, products_alone  # noqa: E402
from selective_models import STATE_SIZE, make_model  # noqa: E402

ALWAYS = {"floor", "hf_compressm"}


def measured(folder: Path, *arguments: str) -> dict[str, dict[str, dict[str, float]]]:
    """What the benchmark of the floor writes, by family and state size."""
    floor.main(["--tiny", "--repeats", "1", "--output-dir", str(folder), *arguments])
    found = json.loads((folder / "floor.json").read_text())
    return {name.split(",")[0]: times for name, times in found.items()}


def test_the_floor_is_measured_beside_all_peers(tmp_path, capsys) -> None:
    pytest.importorskip("mambapy")
    found = measured(tmp_path)
    assert list(found) == list(FAMILIES)
    for name, family in FAMILIES.items():
        expected = ALWAYS | ({"transformers"} if family.is_stock else set())
        expected |= {"mambapy"} if family.has_mambapy else set()
        expected |= {"decode_transformers", "decode_hf_compressm"} if family.has_steps else set()
        assert list(found[name]) == ["4", "2"]
        assert all(set(times) == expected for times in found[name].values())
    table = (tmp_path / "floor.md").read_text()
    assert "ours / floor" in table and "LRU, 1 layers of width 8" in capsys.readouterr().out


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


def test_rows_of_projections_are_counted(tmp_path) -> None:
    arguments = ["--families", "mamba2", "--seeds", "1", "--steps", "2", "--output-dir", str(tmp_path)]
    projection_rows.main(arguments)
    found = json.loads((tmp_path / "projection_rows.json").read_text())["mamba2"]
    mixed, half, quarter = (found[name]["parameters"][0] for name in ("all", "1/2", "1/4"))
    # Two layers: a row of B or of C is one of 32 numbers, four of the convolution with its bias, and 8 of a matrix.
    row = 2 * 2 * (32 + 4 + 1 + 8)
    assert (mixed - half, mixed - quarter) == (32 * row, 48 * row)
    assert (tmp_path / "projection_rows.md").read_text().count("| mamba2") == 4


def test_peers_that_need_more_memory_than_there_is_are_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(floor, "fits_in_memory", lambda *_: False)
    found = measured(tmp_path, "--families", "Mamba-2")["Mamba-2"]
    assert all(set(times) == ALWAYS for times in found.values())
    assert measured(tmp_path, "--families", "Mamba-2", "--peers", "none")["Mamba-2"].keys() == found.keys()


def test_few_peers_are_those_of_one_size() -> None:
    options = lambda peers: argparse.Namespace(peers=peers, tiny=False)  # noqa: E731
    asked = {peers: [(n, width) for width in floor.MODELS for n in (64, 8)
                     if floor.peers_are_asked_for(n, width, options(peers))]
             for peers in ("all", "few", "none")}  # fmt: skip
    assert len(asked["all"]) == 6 and asked["few"] == [(64, 32)] and not asked["none"]


# Some of what stands between projections in each family.
_BETWEEN = {"aten::softplus", "aten::convolution", "aten::exp", "aten::_fft_r2c"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_floor_computes_every_product_of_the_projections(name) -> None:
    """Its products are those of the model, forward and backward, and it leaves out all else of a mixer."""

    def operations(model: torch.nn.Module) -> tuple[Counter, set[str]]:
        with torch.profiler.profile(record_shapes=True) as profile:
            model.train()(**token_batch(2, 6)).loss.backward()
        # Before the two factors `addmm` has what it adds.
        factors = {"aten::mm": slice(0, 2), "aten::addmm": slice(1, 3)}
        events = [event for event in profile.events() if event.name in factors]
        products = Counter(str(event.input_shapes[factors[event.name]]) for event in events)
        return products, {event.name for event in profile.events()}

    sizes = {"hidden_size": 8, "layers": 2}
    (whole, names), (alone, names_alone) = (
        operations(change(FAMILIES[name].make(4, **sizes))) for change in (lambda model: model, products_alone)
    )
    assert _BETWEEN & names and not _BETWEEN & names_alone
    # The backward pass of the LRU computes again what enters the states.
    again = Counter({"[[12, 8], [8, 8]]": 2}) if name == "LRU" else Counter()
    assert whole == alone + again and sum(alone.values()) >= 3 * (2 * 2 + 1) - (name == "S4D") * 6


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_the_bytes_of_a_cache_are_those_of_its_recurrent_states(family) -> None:
    model = make_model(family, 24, width=16)
    found = selective_speed.cache_bytes(model.eval(), token_batch(2, 6, 24)["input_ids"])
    channels = 2 * 16 * 2  # of two layers
    assert found == 2 * channels * STATE_SIZE * 4
