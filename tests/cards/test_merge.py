"""A card that others write too: what a person has written survives, what a program has written is written anew."""

from __future__ import annotations

import pytest
import yaml

from hf_compressm.cards import Evaluation, is_machine_made, merge_card, merge_trainer_card, renamed, render_card
from hf_compressm.errors import CardError

from .test_section import cut, facts

TRAINER = """---
library_name: transformers
tags:
- generated_from_trainer
metrics:
- accuracy
model-index:
- name: run
  results:
  - task:
      name: Causal Language Modeling
      type: text-generation
    dataset:
      name: wikitext
      type: wikitext
    metrics:
    - type: accuracy
      value: 0.5
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run

This model was trained from scratch.
"""


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_without_a_card_the_whole_card_is_written_and_can_be_written_anew() -> None:
    first = merge_card(None, render_card(facts(cut(10))))
    assert is_machine_made(first)
    second = merge_card(first, render_card(facts(cut(10), cut(20, before=4, after=2))))
    assert is_machine_made(second) and "from 8 to 2" in second and "from 8 to 4" not in second
    assert merge_card(second, render_card(facts(cut(10), cut(20, before=4, after=2)))) == second


def test_a_card_that_a_person_wrote_keeps_its_text_and_gains_a_section() -> None:
    mine = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nIt reads digits.\n"
    card = merge_card(mine, render_card(facts()))
    assert "# My model\n\nIt reads digits." in card and "## Compression of the state" in card
    assert metadata(card)["license"] == "mit"
    assert metadata(card)["tags"] == ["mine", "compressm", "state-space-model", "mamba"]
    again = merge_card(card, render_card(facts(cut(10), cut(20, before=4, after=2))))
    assert "It reads digits." in again and again.count("## Compression of the state") == 1 and "from 8 to 2" in again


def test_text_added_around_the_section_survives() -> None:
    card = merge_card(None, render_card(facts()))
    edited = card.replace("# small", "# small\n\nUse it with care.") + "\n## Thanks\n\nTo all.\n"
    assert not is_machine_made(edited)
    merged = merge_card(edited, render_card(facts(cut(30))))
    assert "Use it with care." in merged and merged.endswith("## Thanks\n\nTo all.\n") and "step 30" in merged


def test_a_section_edited_by_hand_stays_as_text_above_the_new_one() -> None:
    card = merge_card(None, render_card(facts()))
    edited = card.replace("### Limits", "### Limits\n\nNever for medicine.")
    merged = merge_card(edited, render_card(facts(cut(30))))
    assert merged.count("## Compression of the state") == 2 and "Never for medicine." in merged
    assert merged.index("Never for medicine.") < merged.index("<!-- hf_compressm:begin")
    assert merge_card(merged, render_card(facts(cut(30)))) == merged


def test_metadata_added_by_hand_survives_in_a_card_that_is_otherwise_ours() -> None:
    card = merge_card(None, render_card(facts())).replace("tags:\n", "license: mit\ntags:\n- mine\n", 1)
    merged = merge_card(card, render_card(facts(cut(30))))
    assert metadata(merged)["license"] == "mit" and "mine" in metadata(merged)["tags"] and "step 30" in merged


def test_a_lost_end_of_the_section_loses_no_text() -> None:
    card = merge_card(None, render_card(facts())).replace("<!-- hf_compressm:end -->", "My last words.")
    merged = merge_card(card, render_card(facts(cut(30))))
    assert "My last words." in merged and "step 30" in merged and "step 10" in merged


def test_windows_line_endings_are_no_edit() -> None:
    assert is_machine_made(merge_card(None, render_card(facts())).replace("\n", "\r\n"))


def test_the_trainers_card_gets_the_section() -> None:
    ours = merge_card(None, render_card(facts()))
    card = merge_trainer_card(ours, TRAINER, render_card(facts()))
    assert "This model was trained from scratch." in card and "## Compression of the state" in card
    assert set(metadata(card)["tags"]) == {"generated_from_trainer", "compressm", "state-space-model", "mamba"}
    # The next push of the same run overwrites it again.
    newer = TRAINER.replace("trained from scratch", "trained for longer").replace("value: 0.5", "value: 0.75")
    again = merge_trainer_card(card, newer, render_card(facts(cut(20))))
    assert "trained for longer" in again and "from scratch" not in again and "step 20" in again
    values = [m["value"] for r in metadata(again)["model-index"][0]["results"] for m in r["metrics"]]
    assert values == [0.75]


def test_what_a_person_wrote_survives_the_trainer() -> None:
    card = merge_trainer_card(None, TRAINER, render_card(facts()))
    mine = card.replace("This model was trained from scratch.", "I trained this on my own data.")
    again = merge_trainer_card(mine, TRAINER, render_card(facts(cut(20))))
    assert "my own data" in again and "trained from scratch" not in again and "step 20" in again


def test_results_of_others_stay_beside_ours() -> None:
    evaluations = [Evaluation("perplexity", 7.0, 7.1, "wikitext")]
    card = merge_card(TRAINER.replace("<!-- This", "<!-- Mine: this"), render_card(facts(evaluations=evaluations)))
    newer = [Evaluation("perplexity", 7.0, 6.5, "wikitext")]
    again = merge_card(card, render_card(facts(evaluations=newer)))
    values = [[m["value"] for m in r["metrics"]] for r in metadata(again)["model-index"][0]["results"]]
    assert values == [[0.5], [6.5]]


def test_unreadable_metadata_is_told_and_nothing_is_lost() -> None:
    with pytest.raises(CardError, match="between the two `---`"):
        merge_card("---\ntags: [unclosed\n---\n\n# Mine\n", render_card(facts()))


def test_metadata_cannot_build_objects(tmp_path) -> None:
    marker = tmp_path / "ran"
    hostile = f"---\ntags: !!python/object/apply:os.mkdir ['{marker}']\n---\n\n# Mine\n"
    with pytest.raises(CardError):
        merge_card(hostile, render_card(facts()))
    assert not marker.exists()


def test_the_loading_line_takes_the_repositorys_name() -> None:
    card = merge_card(None, render_card(facts(name="out")))
    pushed = renamed(card, "me/out")
    assert 'from_pretrained("me/out")' in pushed and is_machine_made(pushed) and renamed(pushed, "me/out") == pushed
    edited = card.replace("### Limits", "### My limits")
    assert renamed(edited, "me/out") == edited
