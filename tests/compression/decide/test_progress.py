"""What a check knows of the run before it."""

from __future__ import annotations

import pytest

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import CheckRecord, LayerRecord
from hf_compressm.compression.decide.progress import Stage, has_been_cut, is_finished, stage_of

STABLE = CompreSSMConfig(when_stable=0.9, uniform=False)


def layer(name: str, before: int, after: int, correlation: float | None = None) -> LayerRecord:
    return LayerRecord(name, "mamba", before, after, after, [1.0], 0.0, 0.0, rank_correlation=correlation)


def check(*layers: LayerRecord, outcome: str = "kept") -> CheckRecord:
    return CheckRecord(outcome, "", list(layers))


def test_a_single_check_of_its_own() -> None:
    stage = stage_of([], CompreSSMConfig(), {"a": None})
    assert stage == Stage() and stage.is_last and stage.waiting == frozenset()


def test_a_layer_waits_until_its_order_has_settled_twice_running() -> None:
    records = [check(layer("a", 8, 8), layer("b", 8, 8))]
    assert stage_of(records, STABLE, {"a": 0.95, "b": 0.95}, 2, 9).waiting == {"a", "b"}
    records.append(check(layer("a", 8, 8, 0.95), layer("b", 8, 8, 0.5)))
    assert stage_of(records, STABLE, {"a": 0.91, "b": 0.99}, 3, 9).waiting == {"b"}
    assert stage_of(records, STABLE, {"a": 0.89, "b": 0.99}, 3, 9).waiting == {"a", "b"}
    assert stage_of(records, STABLE, {"a": None, "b": None}, 3, 9).waiting == {"a", "b"}


def test_the_end_of_the_window_is_the_limit() -> None:
    assert stage_of([check(layer("a", 8, 8))], STABLE, {"a": 0.1}, 9, 9).waiting == frozenset()


def test_a_layer_is_cut_once() -> None:
    records = [check(layer("a", 8, 4), layer("b", 8, 8), outcome="cut")]
    assert stage_of(records, STABLE, {"a": 1.0, "b": 0.1}, 9, 9).waiting == {"a"}
    assert not is_finished(records, STABLE, ["a", "b"]) and is_finished(records, STABLE, ["a"])
    assert not is_finished(records, CompreSSMConfig(), ["a"]), "without when_stable later checks may cut again"


def test_a_cut_that_was_taken_back_does_not_count() -> None:
    records = [check(layer("a", 8, 4), outcome="cut"), check(layer("a", 4, 8), outcome="rolled_back")]
    assert not has_been_cut(records, "a")
    halve = CompreSSMConfig(rollback_tolerance=0.1, after_rollback="halve")
    assert stage_of(records, halve, {"a": None}).scale == 0.5
    assert stage_of(records * 2, halve, {"a": None}).scale == 0.25
    assert is_finished(records, CompreSSMConfig(rollback_tolerance=0.1), ["a"]) and not is_finished(
        records, halve, ["a"]
    )


def test_original_sizes_are_those_before_the_first_cut() -> None:
    records = [
        CheckRecord("skipped", ""),
        check(layer("a", 8, 4), outcome="cut"),
        check(layer("a", 4, 2), outcome="cut"),
    ]
    assert stage_of(records, CompreSSMConfig(), {"a": None}).original_sizes == {"a": 8}


@pytest.mark.parametrize("number, last", [(1, False), (2, False), (3, True)])
def test_the_last_check(number: int, last: bool) -> None:
    assert stage_of([], CompreSSMConfig(), {}, number, 3).is_last == last
