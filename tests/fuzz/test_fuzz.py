"""A part of the odd inputs that `python -m tests.fuzz.run` tries: each is refused with a clear error, or works."""

from __future__ import annotations

import pytest

from .fuzz import AREAS, tried
from .judge import BrokenRule, Case, judged

# Other inputs than those of the table.
SEED = 1
COUNTS = {
    "settings": 300,
    "analyze and compress": 60,
    "callback": 12,
    "checkpoints": 12,
    "command line": 20,
    "files": 60,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", AREAS)
def test_odd_inputs_are_refused_clearly_or_work(area: str) -> None:
    result = tried(area, COUNTS[area], SEED)
    assert result.broken == [] and result.count == COUNTS[area]
    outcomes = {name for counter in result.outcomes.values() for name in counter}
    assert "worked" in outcomes and len(outcomes) > 1, "the inputs are all good or all bad"


def _raise(error: Exception):
    raise error


def test_what_breaks_the_rule_is_found() -> None:
    with pytest.raises(BrokenRule, match="gave KeyError"):
        judged(Case("kind", "it", lambda: {}["a"]))
    changing = iter("ab")
    with pytest.raises(BrokenRule, match="something was changed"):
        judged(Case("kind", "it", lambda: _raise(OSError("a full disk")), lambda: next(changing), own=(OSError,)))
    with pytest.raises(BrokenRule, match="was taken, and the sizes differ"):
        judged(Case("kind", "it", lambda: 1, check=lambda result: _raise(AssertionError("the sizes differ"))))
