"""The accuracy benchmark of selective layers: what is measured again takes the place of what is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))
import selective_accuracy  # noqa: E402

FAMILY = "mamba"
FORMS = selective_accuracy.forms_of(FAMILY)


def figures(value: float, seeds: int = 2) -> dict:
    by_form = {form: {"8": [value] * seeds} for form in selective_accuracy.FORMS}
    return {"uncut": [value] * seeds, "right after": by_form, "in training": {"mixed": {"10%": [value] * seeds}}}


def found(value: float, uncut: float, forms: list[str]) -> dict:
    return {"uncut": uncut, "right after": {form: {"8": value} for form in forms}, "in training": {}}


def test_a_family_has_one_row_for_a_form_that_is_its_default() -> None:
    assert "mixed, interpolative" not in FORMS and "mixed, interpolative" in selective_accuracy.forms_of("mamba2")


def test_one_form_of_the_same_model_is_replaced_alone() -> None:
    known = figures(1.0)
    selective_accuracy.replace(FAMILY, known, 1, found(2.0, 1.00001, FORMS[:1]))
    assert known["uncut"] == [1.0, 1.0] and list(known["right after"]) == FORMS
    assert known["right after"][FORMS[0]]["8"] == [1.0, 2.0] and known["right after"][FORMS[1]]["8"] == [1.0, 1.0]
    assert known["in training"] == figures(1.0)["in training"]


def test_figures_of_another_model_are_not_mixed_with_those_that_are_known() -> None:
    with pytest.raises(SystemExit, match="trains another model. Give --refresh without a form"):
        selective_accuracy.replace(FAMILY, figures(1.0), 0, found(2.0, 1.1, FORMS[:1]))


def test_all_forms_of_another_model_take_the_place_of_all() -> None:
    known = figures(1.0)
    selective_accuracy.replace(FAMILY, known, 0, found(2.0, 1.1, FORMS))
    assert known["uncut"] == [1.1, 1.0]
    assert all(by_size["8"] == [2.0, 1.0] for by_size in known["right after"].values())
