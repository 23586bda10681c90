"""When checks fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig
from hf_compressm.errors import ConfigurationError
from hf_compressm.training import check_steps


@pytest.mark.parametrize(
    "window, interval, max_steps, expected",
    [
        ((0.0, 0.1), None, 1000, [100]),
        ((0.0, 0.1), None, 30, [3]),
        ((0.0, 0.1), None, 3, [1]),
        ((0.0, 1.0), None, 7, [7]),
        # The paper's settings: a check every 2,000 steps in the first tenth of 180,000.
        ((0.0, 0.1), 2000, 180_000, list(range(2000, 18_001, 2000))),
        ((0.1, 0.3), 50, 1000, [150, 200, 250, 300]),
        ((0.5, 0.6), 10, 100, [60]),
        ((0, 200), None, 1000, [200]),
        ((100, 200), 50, 1000, [150, 200]),
        ((0.0, 1), None, 10, [10]),
    ],
)
def test_known_schedules(window, interval, max_steps, expected) -> None:
    assert check_steps(CompreSSMConfig(window=window, interval=interval), max_steps) == expected


def test_a_window_without_a_check_is_refused_with_its_steps() -> None:
    with pytest.raises(ConfigurationError, match=r"covers the steps 0 to 30, and the interval is 2000"):
        check_steps(CompreSSMConfig(interval=2000), 100)


@given(
    window=st.tuples(st.floats(0, 0.5), st.floats(0.51, 1)),
    interval=st.none() | st.integers(1, 50),
    max_steps=st.integers(1, 10_000),
)
def test_checks_lie_in_the_window(window, interval, max_steps) -> None:
    try:
        steps = check_steps(CompreSSMConfig(window=window, interval=interval), max_steps)
    except ConfigurationError:
        assert interval is not None and interval > (window[1] - window[0]) * max_steps - 1
        return
    assert steps == sorted(set(steps))
    assert all(window[0] * max_steps - 1e-6 <= step <= max(1, window[1] * max_steps + 1e-6) for step in steps)


def test_a_run_that_must_arrive_is_checked_at_the_end_of_its_window() -> None:
    target = CompreSSMConfig(strategy="target", target_ratio=0.5, window=(0, 100), interval=30)
    assert check_steps(target, 1000) == [30, 60, 90, 100]
    assert check_steps(CompreSSMConfig(when_stable=0.9, window=(0, 100)), 1000) == list(range(10, 101, 10))
    assert check_steps(CompreSSMConfig(when_stable=0.9, window=(0.0, 0.1)), 30) == [1, 2, 3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": (0, 50), "interval": 10, "rollback_after": 10}, "only 9 steps lie between a check and the next"),
        ({"window": (0, 50), "interval": 1}, "before any evaluation"),
        ({"window": (0.0, 1.0), "rollback_after": 1}, "only 0 steps lie between"),
    ],
)
def test_a_cut_that_could_not_be_judged_in_time_is_refused(settings: dict, message: str) -> None:
    config = CompreSSMConfig(rollback_tolerance=0.1, rollback_metric="eval_loss", **settings)
    with pytest.raises(ConfigurationError, match=message):
        check_steps(config, 100)


def test_a_window_beyond_the_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no check falls into the window"):
        check_steps(CompreSSMConfig(window=(0, 200)), 100)
